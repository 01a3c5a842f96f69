"""The watchdog, in processes that hang."""

from __future__ import annotations

import subprocess
import sys
import time

SCRIPT = """
import ctypes, time
from hpsearch.fleets import watchdog

watchdog.SLACK_S = 0.1
dog = watchdog.Watchdog()
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT + script], capture_output=True, text=True, timeout=60)


def test_process_that_holds_the_interpreters_lock_is_ended_and_tells_where_it_hung() -> None:
    began = time.monotonic()
    ended = run("dog.arm(0.3)\ndef stuck():\n    ctypes.PyDLL(None).sleep(50)\nstuck()")
    assert time.monotonic() - began < 20
    assert ended.returncode == 1
    assert "in stuck" in ended.stderr


def test_process_that_gives_signs_of_life_goes_on() -> None:
    ended = run("for _ in range(30):\n    dog.arm(2.0)\n    time.sleep(0.1)\nprint('done')\ndog.disarm()")
    assert (ended.returncode, ended.stdout) == (0, "done\n")


def test_process_that_is_disarmed_may_wait_for_as_long_as_it_likes() -> None:
    ended = run("dog.arm(0.2)\ndog.disarm()\ntime.sleep(0.6)\nprint('done')")
    assert (ended.returncode, ended.stdout) == (0, "done\n")
