"""Where and with what a study runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpsearch.cli.environment import environment


@pytest.mark.skipif(not Path("/proc/sys/kernel/random/boot_id").exists(), reason="the system names no start of its own")
def test_start_of_the_machine_has_a_name_that_lasts_as_long_as_it_runs(tmp_path: Path) -> None:
    first, second = (environment(tmp_path)["boot"] for _ in range(2))
    assert first
    assert first == second


def test_system_that_does_not_tell_when_it_was_started_gives_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_text = Path.read_text

    def refuse(self: Path, *arguments: Any, **options: Any) -> str:
        if self.is_relative_to("/proc"):
            raise PermissionError("no /proc here")
        return read_text(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert environment(tmp_path)["boot"] == ""
