"""The tracker: sends what is due, remembers what was taken, and never stands in a search's way.

`Tracker.sync` may be called over and over with the study's latest state, from one thread; `TrackerThread` does that
beside a running launch. Both tell in a `SyncReport` what became of it, and raise nothing.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from hpsearch.errors import HpsearchError, JournalError, TrackerError
from hpsearch.journal import JournalTail
from hpsearch.notes import FILE_NAME as NOTES_FILE
from hpsearch.notes import Note, read_notes
from hpsearch.report.figures import Topic
from hpsearch.state import StudyState
from hpsearch.tracker.mlflow_writer import (
    MlflowWriter,
    OutOfReach,
    Refused,
    Signature,
    load_mlflow,
    make_client,
    one_line,
    resolve_uri,
)
from hpsearch.tracker.operations import (
    LogChild,
    LogEnsemble,
    OpenStudy,
    Operation,
    SetStatus,
    UpdateStudy,
    due_operations,
)
from hpsearch.tracker.outbox import Outbox, absolute, redact

MakePackage = Callable[[StudyState, Mapping[int, str]], Path | None]
"""The ensemble's package folder, given each trial's run id; None when there is nothing to package."""

MakePlots = Callable[[Topic, StudyState], Mapping[str, bytes]]
"""PNGs by file name."""

REST = 9.0  # times the processor's time that it took: between two batches, where a session's priority is out of reach
NICE = 19  # last: Ray gives its workers 15. What is left over is enough, and all of it comes once the search is over
HTTP_THREADS = 4  # measured: 199 ms per trial one at a time, 95 with 8; a local SQLite file takes one at a time


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """Where the logbook stands. What MLflow has not told is None."""

    tracking_uri: str  # without credentials
    sent: int = 0  # operations, this time
    waiting: int = 0  # operations that MLflow has not taken
    error: str | None = None  # why, in one line
    out_of_reach: bool = False  # another attempt may succeed
    experiment_id: str | None = None
    run_id: str | None = None
    model: str | None = None
    version: str | None = None
    alias: str | None = None  # None when this version does not hold it
    alias_why: str | None = None
    test_uses: int | None = None  # studies of the experiment that opened this test split, this one included

    def as_json(self) -> dict[str, object]:
        """The `mlflow` object of `launch --json`."""
        names = ("tracking_uri", "experiment_id", "run_id", "model", "version", "alias")
        told: dict[str, object] = {name: getattr(self, name) for name in names}
        return told if self.run_id is not None else dict.fromkeys(names)

    def raise_for_error(self) -> None:
        """What `hpsearch sync` does with a report that is not whole.

        Raises:
            TrackerError: something is waiting.
        """
        if self.error is not None:
            raise TrackerError(self.error)


class Tracker:
    """Sends one study to one MLflow server."""

    def __init__(
        self,
        run_dir: Path,
        *,
        tracking_uri: str | None = None,
        package: MakePackage | None = None,
        plots: MakePlots | None = None,
    ) -> None:
        """Nothing is imported or contacted yet.

        Args:
            tracking_uri: as given on the command line; without it MLFLOW_TRACKING_URI, then MLflow's own default.
            package: makes the folder that is registered; by default `hpsearch.packing`.
            plots: makes the figures that are logged; none by default.
        """
        self.run_dir = run_dir
        self.given_uri = tracking_uri
        self._folder = Path.cwd()  # what a relative SQLite address means is settled now
        self._package = package or (lambda state, run_ids: _pack(run_dir, state))
        self._plots = plots
        self._uri: str | None = None
        self._outbox: Outbox | None = None
        self._writer: MlflowWriter | None = None
        self._unsure = True  # whether a run may be there that the outbox does not know
        self._refused: dict[str, tuple[str, str]] = {}  # key -> revision and reason; not tried again by this process
        self._test_uses: int | None = None
        self._prepared = False

    def prepare(self) -> None:
        """Import MLflow and open its store; two or three seconds, better spent while the study starts.

        A new SQLite store gets its tables here. What goes wrong is told by the first `sync`, which tries again.
        """
        load_mlflow()
        if not self._prepared:
            self._prepared = True
            with contextlib.suppress(OutOfReach, Refused):
                make_client(self._settled_uri(), write_ahead_log=True)

    def run_ids(self) -> dict[int, str]:
        """The run of each trial that MLflow has."""
        runs = self._outbox.runs if self._outbox is not None else {}
        return {int(key.removeprefix("trial/")): run for key, run in runs.items() if key.startswith("trial/")}

    def sync(self, state: StudyState, *, running: bool = True) -> SyncReport:
        """Send everything that is due; never raises what MLflow, the network or the disk may cause.

        Args:
            running: a driver holds the study. Without one, a study that has not ended counts as interrupted.
        """
        sent = 0
        error: str | None = None
        out_of_reach = False
        try:
            if state.opened is not None:
                outbox, writer = self._connect(state)
                sent = self._send_all(outbox, writer, state, running)
        except OutOfReach as problem:
            error, out_of_reach = str(problem), True
            self._unsure, self._writer = True, None
        except Refused as problem:
            error = str(problem)
        except HpsearchError as problem:
            error = problem.message
        except Exception as problem:  # a full disk, a fault of MLflow's: what it left behind is asked next time
            error, out_of_reach = self.explain(problem), True
            self._unsure, self._writer = True, None
        return self._report(state, sent=sent, error=error, out_of_reach=out_of_reach, running=running)

    def explain(self, problem: Exception) -> str:
        """What was not expected, in one line without credentials."""
        return one_line(f"{type(problem).__name__}: {problem}", self._uri or self.given_uri or "")

    def close(self) -> None:
        """Let another process send this study."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._outbox is not None:
            self._outbox.close()
            self._outbox = None

    # Contact

    def _connect(self, state: StudyState) -> tuple[Outbox, MlflowWriter]:
        assert state.opened is not None
        uri = self._settled_uri()
        if self._outbox is None:
            self._outbox = Outbox(self.run_dir, uri)
        if self._writer is None:
            settings = state.opened.spec.get("mlflow")
            experiment = settings.get("experiment") if isinstance(settings, Mapping) else None
            self._writer = MlflowWriter(uri, experiment=str(experiment or state.name))
        if self._unsure:
            self._reconcile(self._outbox, self._writer, state.uid)
            self._unsure = False
        return self._outbox, self._writer

    def _settled_uri(self) -> str:
        if self._uri is None:
            self._uri = absolute(resolve_uri(self.given_uri), self._folder)
        return self._uri

    def _reconcile(self, outbox: Outbox, writer: MlflowWriter, uid: str) -> None:
        """Learn which runs of the study are there: creating one is the only step that must not happen twice.

        One search per start, and one after an outage; a process that died between creating a run and writing that
        down leaves nothing else behind.
        """
        found = {} if writer.experiment_is_new else writer.find_runs(uid)
        known = outbox.runs.get("study")
        if known is not None and known not in found.values():
            lifecycle = writer.lifecycle(known)
            if lifecycle == "deleted":
                raise Refused(
                    f"the study's run {known} was deleted in MLflow; restore it: mlflow runs restore --run-id {known}"
                )
            if lifecycle == "missing":
                outbox.forget()  # another database at the same address
        for key, run_id in found.items():
            if key not in outbox.runs:
                outbox.adopt(key, run_id)

    # Sending

    def _send_all(self, outbox: Outbox, writer: MlflowWriter, state: StudyState, running: bool) -> int:
        sent = 0
        trials: list[LogChild] = []
        for operation in due_operations(state, dict(outbox.revisions), notes=_notes(self.run_dir), running=running):
            refused = self._refused.get(operation.key)
            if refused is not None and refused[0] == operation.revision:
                continue
            if operation.key.startswith("trial/") and isinstance(operation, LogChild):
                trials.append(operation)  # they come one after another, and do not depend on each other
                continue
            sent += self._send_trials(outbox, writer, trials)
            trials = []
            sent += self._try(outbox, writer, operation, state)
        return sent + self._send_trials(outbox, writer, trials)

    def _send_trials(self, outbox: Outbox, writer: MlflowWriter, trials: list[LogChild]) -> int:
        over_http = writer.uri.startswith(("http://", "https://"))
        if not over_http or len(trials) < 2:
            return sum(self._try(outbox, writer, trial, None) for trial in trials)
        lost: list[OutOfReach] = []

        def send(trial: LogChild) -> int:
            if lost:
                return 0
            try:
                return self._try(outbox, writer, trial, None)
            except OutOfReach as problem:
                lost.append(problem)
                return 0

        with ThreadPoolExecutor(max_workers=HTTP_THREADS) as threads:
            sent = sum(threads.map(send, trials))
        if lost:
            raise lost[0]
        return sent

    def _try(self, outbox: Outbox, writer: MlflowWriter, operation: Operation, state: StudyState | None) -> int:
        """1 when it was taken, 0 when it was refused: then the others go on."""
        try:
            self._send(outbox, writer, operation, state)
        except Refused as problem:
            if operation.key == "study":
                raise  # nothing else can be said without it
            self._refused[operation.key] = (operation.revision, str(problem))
            return 0
        return 1

    def _send(self, outbox: Outbox, writer: MlflowWriter, operation: Operation, state: StudyState | None) -> None:
        key = operation.key
        if isinstance(operation, OpenStudy):
            run_id = outbox.runs.get(key)
            new = run_id is None
            if run_id is None:
                run_id = writer.create_run(
                    operation.name, start_ms=operation.start_ms, tags=operation.content.tags, parent=None
                )
                outbox.adopt(key, run_id)
            writer.write(run_id, operation.content, tags=not new)
            outbox.acknowledge(key, operation.revision, run_id=run_id)
            return
        study = outbox.runs["study"]
        if isinstance(operation, UpdateStudy):
            writer.write(study, operation.content)
            if operation.dataset is not None:
                writer.write_dataset(study, operation.dataset)
            self._draw(writer, study, operation.content.plots, state)
            outbox.acknowledge(key, operation.revision)
        elif isinstance(operation, SetStatus):
            if operation.status == "RUNNING":
                writer.reopen_run(study)
            else:
                writer.end_run(study, operation.status, operation.end_ms)
            outbox.acknowledge(key, operation.revision)
        elif isinstance(operation, LogChild):
            run_id = self._child(outbox, writer, operation, state)
            outbox.acknowledge(key, operation.revision, run_id=run_id)
        else:
            self._ensemble(outbox, writer, operation, state)

    def _child(self, outbox: Outbox, writer: MlflowWriter, child: LogChild, state: StudyState | None) -> str:
        run_id = outbox.runs.get(child.key)
        new = run_id is None
        if run_id is None:
            run_id = writer.create_run(
                child.name, start_ms=child.start_ms, tags=child.content.tags, parent=outbox.runs["study"]
            )
            outbox.adopt(child.key, run_id)
        writer.write(run_id, child.content, tags=not new)
        self._draw(writer, run_id, child.content.plots, state)
        writer.end_run(run_id, child.status, child.end_ms)
        return run_id

    def _ensemble(self, outbox: Outbox, writer: MlflowWriter, operation: LogEnsemble, state: StudyState | None) -> None:
        assert state is not None
        known = operation.child.key in outbox.runs
        run_id = self._child(outbox, writer, operation.child, state)
        more: dict[str, str] = {}
        try:
            package = self._package(state, self.run_ids())
        except HpsearchError as problem:
            package, more = None, {"why": problem.message}
        except Exception as problem:  # the logbook goes on without its model, and says so
            package, more = None, {"why": f"the ensemble could not be packaged: {type(problem).__name__}: {problem}"}
        if package is not None:
            registered = writer.register(
                run_id,
                package,
                operation.registration,
                uid=state.uid,
                signature=_signature(state),
                may_exist=known,
            )
            more = {"model": registered.model, "version": registered.version, "why": registered.decision.why}
            if registered.decision.moves:
                more["alias"] = operation.registration.alias
        outbox.acknowledge(operation.key, operation.revision, more=more)

    def _draw(self, writer: MlflowWriter, run_id: str, topic: Topic | None, state: StudyState | None) -> None:
        if topic is None or self._plots is None or state is None:
            return
        try:
            files = self._plots(topic, state)
        except Exception:  # a figure is never worth a search; what it would show is logged as numbers
            return
        if files:
            writer.write_files(run_id, files, folder="plots")

    # Telling

    def _report(
        self, state: StudyState, *, sent: int, error: str | None, out_of_reach: bool, running: bool
    ) -> SyncReport:
        outbox = self._outbox
        shown = redact(self._uri or self.given_uri or "")
        if outbox is None:
            waiting = sum(1 for _ in due_operations(state, {}, running=running))
            return SyncReport(tracking_uri=shown, waiting=waiting, error=error, out_of_reach=out_of_reach)
        waiting = 0
        if sent or error is not None or self._refused:  # else nothing was found due a moment ago
            due = due_operations(state, dict(outbox.revisions), notes=_notes(self.run_dir), running=running)
            waiting = sum(1 for _ in due)
        if error is None and waiting and self._refused:
            key, (_, reason) = next(iter(self._refused.items()))
            error = f"MLflow refused {len(self._refused)} of the entries; {key}: {reason}"
        more = outbox.more(_told_ensemble(state, outbox))
        return SyncReport(
            tracking_uri=shown,
            sent=sent,
            waiting=waiting,
            error=error,
            out_of_reach=out_of_reach,
            experiment_id=self._writer.experiment_id if self._writer is not None else None,
            run_id=outbox.runs.get("study"),
            model=more.get("model"),
            version=more.get("version"),
            alias=more.get("alias"),
            alias_why=more.get("why"),
            test_uses=self._count_test_uses(state),
        )

    def _count_test_uses(self, state: StudyState) -> int | None:
        """Asked once, when this study's own use is among those counted."""
        if self._test_uses is None and self._writer is not None and self._outbox is not None:
            told = any(key.startswith("parent/result/") for key in self._outbox.revisions)
            if told and state.data is not None and state.data.test_fingerprint:
                try:
                    self._test_uses = self._writer.count_test_uses(state.data.test_fingerprint)
                except (OutOfReach, Refused):
                    return None
        return self._test_uses


class JournalFollower:
    """The latest state of a study, from its journal: a fold of its own, so no thread reads what another changes."""

    def __init__(self, run_dir: Path) -> None:
        self._tail = JournalTail(run_dir)
        self._state = StudyState()

    def __call__(self) -> StudyState:
        """
        Raises:
            JournalError: a line is damaged.
        """
        for entry in self._tail.new_entries():
            self._state.apply(entry.event, entry.time)
        return self._state


class TrackerThread:
    """A tracker beside a running launch: sends as the study goes, and keeps trying through an outage."""

    def __init__(
        self,
        tracker: Tracker,
        latest: Callable[[], StudyState],
        *,
        warn: Callable[[str], None],
        catch_up: str = "",
        interval_s: float = 0.5,
        max_pause_s: float = 60.0,
    ) -> None:
        """
        Args:
            latest: the study's state; called in this thread alone.
            warn: takes one message, at most once per kind of trouble.
            catch_up: the command that sends the rest later; by default `hpsearch sync RUN`, with the address as given.
            interval_s: between looks at the study.
            max_pause_s: between attempts while MLflow is out of reach; they start at twice the interval.
        """
        self._tracker = tracker
        self._latest = latest
        self._warn = warn
        self._catch_up = catch_up
        self._interval_s = interval_s
        self._max_pause_s = max_pause_s
        self._stopping = threading.Event()
        self._warned = False
        self._report = SyncReport(tracking_uri=redact(tracker.given_uri or ""))
        self._thread = threading.Thread(target=self._run, name="hpsearch-tracker", daemon=True)

    @property
    def report(self) -> SyncReport:
        """As of the last attempt."""
        return self._report

    def start(self) -> TrackerThread:
        """Begin, in the background of all else on this machine; MLflow is imported at once."""
        self._thread.start()
        return self

    def close(self, timeout_s: float = 60.0) -> SyncReport:
        """Send what is left, and end; all there is, where it has not begun. After `timeout_s` the rest is left to
        `hpsearch sync`."""
        self._stopping.set()
        if self._thread.ident is None:
            self._thread.start()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            error = f"MLflow had not taken everything after {timeout_s:g} s"
            self._tell(error)
            return replace(self._report, error=self._report.error or error)
        return self._report

    def _run(self) -> None:
        try:
            if not self._stopping.is_set():  # at the end somebody waits for it
                _step_back()
            self._report = self._attempt(self._latest())  # makes the database
            self._follow()
        except JournalError as problem:
            self._fail(problem.message)
        except Exception as problem:  # the study cannot be read, so nothing is left to send; the search goes on
            self._fail(self._tracker.explain(problem))
        finally:
            with contextlib.suppress(Exception):  # the store may be gone; nothing is owed to it any more
                self._tracker.close()

    def _follow(self) -> None:
        pause_s = self._interval_s
        seen: object = None
        while True:
            last = self._stopping.is_set()
            state = self._latest()
            found = _mark(self._tracker.run_dir, state)
            # A look at 10,000 trials takes 12 ms from the workers of this machine, so it is asked for a reason.
            was_behind = self._report.error is not None
            began = time.thread_time()
            if last or was_behind or found != seen:
                self._report = self._attempt(state)
                seen = found
            worked_s = time.thread_time() - began
            # Once is no outage: a connection that the server gave up while it was idle fails, and the next is new.
            if last and self._report.out_of_reach and not was_behind:
                self._report = self._attempt(state)
            if self._report.error is not None and (was_behind or last):
                self._tell(self._report.error)
            if last:
                return
            behind = self._report.error is not None
            pause_s = min(self._max_pause_s, 2 * pause_s) if behind else self._interval_s
            self._stopping.wait(rest_s(worked_s, least=pause_s, most=self._max_pause_s))

    def _attempt(self, state: StudyState) -> SyncReport:
        """What nobody foresaw counts as an outage: most of it passes, and the study has hours to go."""
        try:
            self._tracker.prepare()
            return self._tracker.sync(state)
        except Exception as problem:
            return replace(self._report, sent=0, error=self._tracker.explain(problem), out_of_reach=True)

    def _fail(self, error: str) -> None:
        self._report = replace(self._report, error=error)
        self._tell(error)

    def _tell(self, error: str) -> None:
        if self._warned:
            return
        self._warned = True
        catch_up = self._catch_up or _catch_up(self._tracker)
        self._warn(f"MLflow: {error}. The study goes on; send the rest later: {catch_up}")


def rest_s(worked_s: float, *, least: float, most: float) -> float:
    """Seconds until the next batch: the workers of this machine need its cores, and MLflow can wait.

    >>> [rest_s(worked_s, least=0.5, most=60.0) for worked_s in (0.01, 0.5, 20.0)]
    [0.5, 4.5, 60.0]
    """
    return max(least, min(most, REST * worked_s))


def _catch_up(tracker: Tracker) -> str:
    """The command that sends the rest, to the same server; its credentials are for the user to fill in."""
    command = f"hpsearch sync {shlex.quote(str(tracker.run_dir))}"
    return f"{command} --tracking-uri {shlex.quote(redact(tracker.given_uri))}" if tracker.given_uri else command


def _mark(run_dir: Path, state: StudyState) -> object:
    """Differs when there may be something new to tell. Events of one instant are told apart by what they count up."""
    counts = (len(state.resumed_at), len(state.trials), len(state.results), len(state.ended_stages), state.n_epochs)
    notes = None
    with contextlib.suppress(OSError):
        notes = (run_dir / NOTES_FILE).stat().st_size  # it only grows
    return state.last_at, counts, len(state.leases), state.ended, notes


def _told_ensemble(state: StudyState, outbox: Outbox) -> str:
    """Key of the ensemble that MLflow has: the one in force, else the one told last, else ""."""
    current = f"ensemble/{state.selected.n_trials}" if state.selected is not None else ""
    told = [key for key in outbox.revisions if key.startswith("ensemble/")]
    return current if current in told else told[-1] if told else ""


def _step_back() -> None:
    """Let workers on this machine go first: MLflow takes a core for 10 ms a trial, and can wait for it."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def _pack(run_dir: Path, state: StudyState) -> Path | None:
    from hpsearch.packing import pack

    return pack(run_dir, state)


def _signature(state: StudyState) -> Signature:
    assert state.data is not None
    data = state.data
    classes = (data.n_classes,) if data.outputs == "logits" and data.n_classes else (-1,)
    return Signature(input_shape=tuple(data.input_shape), input_dtype=data.input_dtype, output_shape=classes)


def _notes(run_dir: Path) -> list[Note]:
    try:
        return read_notes(run_dir)
    except (OSError, ValueError, KeyError):
        return []
