"""What a person sees while a study runs: a line per stage, warnings as they come, one moving line on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from hpsearch.budget import size_text
from hpsearch.cli.output import counted, is_terminal, number, say
from hpsearch.errors import UserCodeError
from hpsearch.events import (
    Confirmed,
    Damaged,
    DataSeen,
    Evaluated,
    Finished,
    OutOfRoom,
    RangeMeasured,
    Returned,
    StageBegan,
    StageEnded,
    StorageBehind,
    StorageCaughtUp,
)
from hpsearch.stages.preflight import checks
from hpsearch.state import Entry, StudyState
from hpsearch.triage import parted, sort_of
from hpsearch.trial import TrialState

if TYPE_CHECKING:
    from rich.status import Status

LIVE_EVERY_S = 0.5
PLAIN_EVERY_S = 10.0  # a line of progress where there is no terminal to redraw
HELD_S = 10.0  # that a crash may wait to be told: three of one kind end the study, and its error tells them
WARNINGS_SHOWN = 3

STAGE_TITLES = {"lr_range": "LR range"}


class Display:
    """Follows a study's entries. Give it every entry once, in order."""

    def __init__(self, state: StudyState, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._state = state
        self._clock = clock
        self._live: Status | None = None
        self._last_line_at = clock()
        self._n_diverged = 0
        self._n_crashed = 0
        self._n_returned = 0
        self._one_lane: set[str] = set()  # why trials of some group cannot share a program, each told once
        self._n_damaged = 0
        self._crash_kinds: set[tuple[str, str]] = set()  # of which one was told, or is held
        self._held: list[tuple[float, Finished]] = []  # crashes that may be what the study ends with, which tells them

    def __enter__(self) -> Display:
        if is_terminal():
            from rich.console import Console

            self._live = Console(file=sys.stderr).status("starting the workers")
            self._live.start()
        else:
            say("starting the workers")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        last = (error.frame, sort_of(error.message)) if isinstance(error, UserCodeError) else None
        self._held = [(at, crash) for at, crash in self._held if (crash.frame, sort_of(crash.message)) != last]
        self._release()

    def show(self, entries: Sequence[Entry]) -> None:
        """Entries that the state has already."""
        for entry in entries:
            self._tell(entry)
        if self._held and self._clock() - self._held[0][0] >= HELD_S:
            self._release()
        # Counting ten thousand trials takes milliseconds, so it is not done for every entry.
        if self._clock() - self._last_line_at < (LIVE_EVERY_S if self._live is not None else PLAIN_EVERY_S):
            return
        self._last_line_at = self._clock()
        line = self._progress()
        if line and self._live is not None:
            self._live.update(line)
        elif line:
            say(line)

    def _tell(self, entry: Entry) -> None:
        match entry.event:
            case DataSeen():
                say(self._rows())
            case StageBegan(stage=stage):
                say(f"{STAGE_TITLES.get(stage, stage)} …")
            case StageEnded(stage="preflight"):
                self._preflight()
            case Evaluated() as found:
                say(_folds_line(found))
            case Confirmed(standings=(first, *others)):
                say(f"confirm: trial {first['trial']} is first of {1 + len(others)} by the mean of its fresh seeds")
            case StageEnded(stage="search", reason=reason):
                told = [self._progress(), f"(ended by {reason})" if reason else ""]
                say(f"search: {' '.join(part for part in told if part)}")
            case RangeMeasured() as measured:
                say(_range_line(measured))
            case Finished(outcome="diverged", trial=int()) as result:
                self._n_diverged += 1
                self._warn(self._n_diverged, "diverged", result)
            case Finished(outcome="out_of_memory") as result:
                self._n_crashed += 1
                self._warn(self._n_crashed, "out-of-memory", result)
            case Finished(outcome="crashed") as result:
                self._hold(result)
            case Finished(values={"one_lane": str() as why}) if why not in self._one_lane:
                self._one_lane.add(why)
                say(f"note: lanes: trials as trial {entry.event.trial} are {why}")
            case Returned(key=key, reason=reason):
                self._n_returned += 1
                if self._n_returned <= WARNINGS_SHOWN:
                    say(f"note: {key} is given out again: {reason}")
            case Damaged(ref=ref, message=message):
                self._n_damaged += 1
                if self._n_damaged <= WARNINGS_SHOWN:
                    say(f"warning[damaged]: {ref}: {message}; what it held is made again where it is needed")
                if self._n_damaged == WARNINGS_SHOWN:
                    say("  note: further ones are counted, not shown")
            case OutOfRoom(ref=ref, n_bytes=n_bytes):
                say(f"warning[disk]: no room for {ref} ({size_text(n_bytes)}) beside the best few; the search ends")
                say("  hint: a larger budget.disk, then launch --resume, goes on with it")
            case StorageBehind(reason=reason, n_entries=n_entries):
                say(f"warning[storage]: {reason}\n  note: {n_entries:,} entries of the journal are not there yet; "
                    "they are sent when it can be done, on a later --resume at the latest")  # fmt: skip
            case StorageCaughtUp():
                say("note: storage has everything again")
            case _:
                pass

    def _preflight(self) -> None:
        """How many checks passed; each that warned, or failed and may, with its cause."""
        found = checks(self._state)
        for check in found:
            if check.status in ("warned", "failed"):
                at = f" ({check.where})" if check.where else ""
                say(f"warning[{check.code}]: not true that {check.name}{at}: {check.found} (expected {check.expected})")
                say(f"  likeliest: {check.cause}\n  hint: {check.look_at}")
        counts = {
            word: sum(each.status == word for each in found) for word in ("passed", "warned", "failed", "skipped")
        }
        say(f"preflight: {', '.join(f'{n} {word}' for word, n in counts.items() if n)}")

    def _rows(self) -> str:
        """`rows: train 897, val 225, ensemble 225 (cut from val), test 450`"""
        assert self._state.data is not None
        rows = dict(self._state.data.n_rows)
        cut = rows.get("ensemble")
        told = [f"{name} {n:,}" + (" (cut from val)" if name == "ensemble" and cut else "") for name, n in rows.items()]
        return f"rows: {', '.join(told)}"

    def _hold(self, result: Finished) -> None:
        """A crash is told once of its kind, and not before it is clear that the study does not end with it."""
        kind = (result.frame, sort_of(result.message))
        if kind not in self._crash_kinds:
            self._crash_kinds.add(kind)
            self._held.append((self._clock(), result))

    def _release(self) -> None:
        for _, result in self._held:
            self._n_crashed += 1
            self._warn(self._n_crashed, "crashed", result)
            if self._n_crashed <= WARNINGS_SHOWN:
                say("  note: told once; further crashes of this kind are counted, not shown")
        self._held.clear()

    def _warn(self, nth: int, code: str, result: Finished) -> None:
        if nth > WARNINGS_SHOWN:
            return
        if result.trial is None:
            where = result.key
        else:
            trial = self._state.trials[result.trial]
            config = ", ".join(f"{k}={number(v)}" for k, v in trial.config.items())
            where = f"trial {trial.number} after epoch {trial.epoch} ({config})"
        frame = f" at {result.frame}" if result.frame else ""
        what, hint = parted(result.message)
        say(f"warning[{code}]: {where}: {what}{frame}" + (f"\n  hint: {hint}" if hint else ""))
        if nth == WARNINGS_SHOWN:
            say("  note: further ones are counted, not shown")

    def _progress(self) -> str:
        state = self._state
        if not state.trials:
            ramps = sum(1 for key in state.results if key.startswith(("ramp/", "probe/")))
            return f"LR range: {counted(ramps, 'ramp')} and probes done" if ramps else ""
        counts = state.counts()
        told = [f"{counts[s]} {s}" for s in TrialState if counts[s]]
        best = state.best()
        line = f"{counted(len(state.trials), 'trial')}: {', '.join(told)}"
        if best is not None and best.best_metrics:
            assert state.opened is not None
            metric = state.opened.spec["metric"]
            assert isinstance(metric, dict)
            value = best.best_metrics.get(metric["name"])
            line += f"; best {metric['name']} {number(value)} (trial {best.number}, epoch {best.best_epoch})"
        return line


def _folds_line(found: Evaluated) -> str:
    """`evaluate: trial 3 is first of 8 by 5 folds; 4 were given up before the last`"""
    if found.reason and not found.standings:
        return f"warning[evaluate]: ended by {found.reason}, with too few folds to tell; the search's own order stands"
    if not found.standings:
        return "warning[evaluate]: none of the best trials came through its folds; the search's own order stands"
    n_given_up = sum(row["chance"] is None for row in found.standings)
    return (
        f"evaluate: trial {found.standings[0]['trial']} is first of {len(found.standings)} by "
        f"{found.folds * found.repeats} folds; {n_given_up} were given up before the last"
    )


def _range_line(measured: RangeMeasured) -> str:
    branch = ", ".join(f"{k}={v}" for k, v in measured.branch.items()) or "all"
    if measured.lr is None:
        return f"warning[lr-range]: {branch}: no ramp gave a finite loss; the whole range is searched"
    how = ", confirmed by probes" if measured.confirmed else ""
    edge = "; the best lies at an edge of the range" if measured.at_edge else ""
    return (
        f"lr of {branch}: {number(measured.lr)}, searched in [{number(measured.low)}, {number(measured.high)}] "
        f"(seeds differ by {measured.spread_decades:.2f} decades{how}{edge})"
    )
