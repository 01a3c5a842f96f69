"""Ends a worker's process that hangs, so that whoever hosts it begins another.

The study takes a job away from a worker that is silent for too long, but cannot end its process, which would keep its
GPU for nothing. So the process watches itself, from a thread without Python: it acts also when Python is stuck in a
lock, in native code or in a driver call. Where even a signal is not heard (a frozen machine), the lease alone holds.
"""

from __future__ import annotations

import faulthandler

SLACK_S = 15.0  # beyond the study's patience: the job is somebody else's by then, and nothing is lost
STDERR = 2  # by number: the host may have put an object without a file in place of sys.stderr


class Watchdog:
    """An alarm that ends this process. What its threads were doing stands on stderr then, in the worker's log."""

    def arm(self, silence_s: float) -> None:
        """End the process in about `silence_s` from now, unless armed anew or disarmed."""
        faulthandler.dump_traceback_later(silence_s + SLACK_S, exit=True, file=STDERR)

    def disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
