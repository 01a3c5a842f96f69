"""What is said of a Ray that does not come; no cluster is started."""

from __future__ import annotations

import pytest

from hpsearch.errors import ClusterError
from hpsearch.fleets.ray_cluster import be_quiet, connect

TIMED_OUT = "The current node timed out during startup. This could happen because the GCS has become overloaded."


def test_ray_that_is_too_slow_to_start_is_exit_4_and_the_command_again(monkeypatch: pytest.MonkeyPatch) -> None:
    be_quiet()

    def init(**options: object) -> None:
        raise Exception(TIMED_OUT)  # as ray does, of no class of its own

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(ClusterError) as caught:
        connect(None)
    assert caught.value.exit_code == 4
    assert str(caught.value) == (
        f"error[ray]: Ray did not start on this machine: {TIMED_OUT}\n"
        "  hint: launch again with --resume, when the machine has less to do; nothing that was finished is lost"
    )
