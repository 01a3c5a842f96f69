"""Tune's folder goes with its driver, also with one that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hpsearch.fleets.tune_scratch import PREFIX, YOUNG_S, TuneScratch


def folders(parent: Path) -> list[Path]:
    return sorted(parent.glob(f"{PREFIX}*"))


def age(folder: Path) -> None:
    then = time.time() - YOUNG_S - 1
    os.utime(folder, (then, then))


def test_folder_is_gone_when_it_is_closed(tmp_path: Path) -> None:
    scratch = TuneScratch(tmp_path)
    (scratch.path / "workers").mkdir()
    scratch.close()
    assert folders(tmp_path) == []


def test_folder_of_a_killed_driver_is_removed_by_the_next_one(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from hpsearch.fleets.tune_scratch import TuneScratch
scratch = TuneScratch(Path({str(tmp_path)!r}))
print(scratch.path, flush=True)
input()
"""
    driver = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert driver.stdout is not None
    left = Path(driver.stdout.readline().strip())
    age(left)
    living = TuneScratch(tmp_path)
    assert left in folders(tmp_path)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    next_one = TuneScratch(tmp_path)
    assert folders(tmp_path) == sorted([living.path, next_one.path])
    living.close()
    next_one.close()


def test_folder_that_is_just_being_made_is_left_alone(tmp_path: Path) -> None:
    young = tmp_path / f"{PREFIX}young"
    young.mkdir()
    TuneScratch(tmp_path).close()
    assert folders(tmp_path) == [young]
    age(young)
    TuneScratch(tmp_path).close()
    assert folders(tmp_path) == []
