"""What workers of a machine tell each other of lanes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpsearch.training.width_notes import WidthNotes


def test_width_is_read_by_others_of_the_same_setting_and_group_alone(tmp_path: Path) -> None:
    WidthNotes(tmp_path, "cpu 1").write("a", 16)
    assert WidthNotes(tmp_path, "cpu 1").read("a") == 16
    assert WidthNotes(tmp_path, "cpu 1").read("b") is None
    assert WidthNotes(tmp_path, "cpu 2").read("a") is None
    WidthNotes(tmp_path, "cpu 1").write("a", 1)
    assert WidthNotes(tmp_path, "cpu 1").read("a") == 1


@pytest.mark.parametrize("content", ["", "many", "0", "-3", "99999", "1.5", "é"])
def test_note_that_is_damaged_says_nothing(tmp_path: Path, content: str) -> None:
    notes = WidthNotes(tmp_path)
    notes.write("a", 2)
    (note,) = tmp_path.iterdir()
    note.write_text(content, encoding="utf-8")
    assert notes.read("a") is None


def test_without_a_folder_or_with_one_that_is_gone_nothing_is_known(tmp_path: Path) -> None:
    for notes in (WidthNotes(None), WidthNotes(tmp_path / "gone")):
        notes.write("a", 2)
        assert notes.read("a") is None
