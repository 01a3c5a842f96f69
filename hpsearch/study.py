"""The study: gives out jobs, records results. One per launch, the only writer of the journal.

Workers pull jobs and push results, from threads or from Ray actors. A keeper thread writes the blobs of what was
pushed; then the result is an event like any other, and the thread brings the journal to disk; so nobody who asks for
work waits for a disk. Events are applied in the order in which they stand in the journal, each before the next is
decided: who reads them again comes by the same state, and a crash can lose the end of a study, never its middle. Every
decision is taken by a stage; this module owns what stages must not: the lock, the clock, the leases.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import queue
import threading
import time as time_module
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile

from hpsearch.blobs import BlobStore, digest_of
from hpsearch.budget import Budget, Spent, exhausted
from hpsearch.errors import DamagedBlob, HpsearchError, UserCodeError, internal_error
from hpsearch.events import Arrived, DataSeen, Ended, Event, Finished, Leased, Returned, StageBegan, StageEnded
from hpsearch.job import Assignment, DataInfo, Job, Result, TrainJob, train_parts
from hpsearch.journal import Journal
from hpsearch.keeping import Admission, Keeping
from hpsearch.leases import INHERIT_S, MOST_DEATHS, LeaseBook, Seat
from hpsearch.mirror import Mirror
from hpsearch.stages import FillsLanes, Stage
from hpsearch.stages.confirm import Confirm
from hpsearch.stages.evaluate import Evaluate
from hpsearch.stages.preflight import Preflight
from hpsearch.stages.search import Search
from hpsearch.state import StudyState
from hpsearch.triage import Crash, common_crash, no_usable_trial

MOST_FALSE_STARTS = 3  # deaths of one worker before it has loaded its data
LOOK_FOR_OVERDUE_S = 1.0  # at the leases, at most this often
DRAIN_S = 30.0  # that storage gets at the end of a study to take the rest
HURRIED_DRAIN_S = 3.0  # the same after Ctrl-C, SIGTERM or an error
TOGETHER = ("lr_range", "search", "baselines")  # stages whose jobs may run side by side
COMMIT_EVERY_S = 0.5  # leases reach the disk at least this often; results at once
CRASHES_TO_STOP = 3  # jobs that end by the same traceback before the study is stopped


class Study:
    """One study, open for work."""

    def __init__(
        self,
        *,
        journal: Journal,
        state: StudyState,
        stages: Sequence[Stage],
        blobs: BlobStore,
        budget: Budget | None = None,
        clock: Callable[[], float] = time_module.monotonic,
        background: bool = True,
        inherit_leases: bool = False,
        mirror: Mirror | None = None,
    ) -> None:
        """
        Args:
            mirror: follows the journal and the blobs while the study is open.
            inherit_leases: this study's process was restarted under a driver and workers that live: what the journal
                says is in their hands stays there, if they announce it soon.
            state: after the journal's entries and this driver's Opened event; `stages` were told the same.
            background: a thread keeps results; False: `push` does, and returns when they count (one worker at a time).
        """
        self._journal = journal
        self._state = state
        self._stages = list(stages)
        self._blobs = blobs
        self._mirror = mirror
        self._budget = budget or Budget()
        self._clock = clock
        self._changed = threading.Condition()
        self._book = LeaseBook()
        self._looked_at = float("-inf")  # clock, when overdue leases were last looked for
        self._unheard: set[str] = set()  # workers of the journal that have not spoken to this process yet
        self._pushed: set[str] = set()  # keys whose result is being kept
        self._gone: set[str] = set()  # workers that were lost and have not come back
        self._asking: set[str] = set()  # workers that have asked this process for jobs, and are not gone
        self._lives: Counter[str] = Counter()  # how often a worker of this name has arrived
        self._arrivals: Counter[str] = Counter()  # since it last got as far as its data
        self._unkept: Counter[str] = Counter()  # results of a worker that do not count yet
        self._crashed: set[str] = set()  # workers that pushed a crash last
        self._delivered: dict[str, str] = {}  # worker -> sort of the job whose result it pushed last
        self._suspects: set[str] = set()  # keys of jobs that shared a worker when its process died; given out singly
        # A failed job is given out again under its key, so a copy of the failure must be told from another failure.
        self._attempts = {e.event.attempt for e in journal.entries if isinstance(e.event, Finished)} - {""}
        self._crashes: list[Crash] = []
        self._began_at = clock()
        self._failure: HpsearchError | None = None
        self._ended = False
        self._spent = ""  # the budget that is used up
        self._keeping = Keeping(state, blobs, self._stages, limit_bytes=self._budget.disk_bytes)
        with self._changed:
            workers = {trial.worker for trial in state.trials.values()}
            if inherit_leases:
                self._book.inherit(state.leases, clock())
                self._unheard = workers | {lease.worker for lease in state.leases.values()}
            else:
                self._take_back()
                self._forget_memory_of(workers)
            for event in self._keeping.begin():
                self._record(event)
            self._note_budget()  # one that is used up leaves the search ended, and what came after it valid
            for stage in self._stages:  # an edit may have given new work to several that were through
                if stage.name in state.ended_stages and not stage.finished():
                    self._record(StageBegan(stage=stage.name))
            for event in self._keeping.sweep():
                self._record(event)
            self._advance()
        self._keep_house()
        self._inbox: queue.SimpleQueue[list[tuple[str, Result]] | None] = queue.SimpleQueue()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True) if background else None
        if self._keeper is not None:
            self._keeper.start()
        if mirror is not None:
            mirror.start(self._tell, self._fail)

    # What workers call

    def arriving(self, worker: str, node: str = "", pid: int = 0) -> None:
        """A worker's process has begun. What an earlier one of this name held is given out again."""
        with self._changed:
            seat = self._state.seats.get(worker)
            same_node = node == (seat.node if seat else "")
            if pid and seat is not None and same_node and pid == seat.pid:
                return  # the call came twice
            if same_node:  # else its node has gone, which is no fault of the job's, or of the task's
                self._blame(worker, "its worker was restarted")
            else:
                self._arrivals[worker] = 0
            self._let_go(worker, "its worker was restarted")
            self._lives[worker] += 1
            self._arrivals[worker] += 1
            if self._arrivals[worker] > MOST_FALSE_STARTS:
                self._fail_locked(
                    UserCodeError(
                        f"{worker}'s process died {MOST_FALSE_STARTS} times while it loaded the task and its data",
                        hint="run out of memory? hpsearch launch --fleet local shows what the process says",
                    )
                )
                return
            if not self._ended and (node or pid):
                self._record(Arrived(worker=worker, node=node, pid=pid))
            self._gone.discard(worker)
            self._unheard.discard(worker)
            self._changed.notify_all()

    def hello(self, worker: str, info: DataInfo) -> Assignment:
        """A worker has its data.

        The answer has an `error` when they differ from those of the first worker.
        """
        with self._changed:
            if self._ended:
                return Assignment(ended=True)
            self._arrivals[worker] = 0
            known = self._state.data
            if known is None:
                self._record(DataSeen(info=dataclasses.asdict(info)))
                self._refuse_few_rows()
                self._advance()
            elif known.fingerprint != info.fingerprint or known.n_rows != info.n_rows:
                rows = "" if info.n_rows == known.n_rows else f" (rows {info.n_rows}, the study's {known.n_rows})"
                first = "the first worker got" if len(self._state.resumed_at) == 1 else "this study began with"
                return Assignment(error=f"Task.data() gave {worker} other data than {first}{rows}")
            else:
                self._refuse_few_rows()
            self._changed.notify_all()
        self._commit_now()
        return Assignment()

    def _refuse_few_rows(self) -> None:
        for stage in self._stages:
            refusal = stage.refusal() if isinstance(stage, Evaluate) else None
            if refusal is not None:
                self._fail_locked(refusal)

    def pull(self, worker: str, slots: int = 1, timeout_s: float = 0.0, beside: Job | None = None) -> Assignment:
        """Up to `slots` jobs; empty when `timeout_s` passed without one.

        Args:
            beside: a job that the worker has, or had last: only such as may share its program are wanted.
        """
        deadline = self._clock() + timeout_s
        with self._changed:
            life = self._lives[worker]
            self._unheard.discard(worker)
            self._gone.discard(worker)  # who asks for work is alive
            self._asking.add(worker)
            while True:
                if self._ended:
                    return Assignment(ended=True)
                if life != self._lives[worker] or worker in self._gone:
                    return Assignment()  # whoever asked has died meanwhile
                self._expire_leases()
                self._watch_budget()
                jobs = self._give(worker, slots, beside)
                if not jobs and not self._state.leases:  # nobody else will bring what is to follow
                    self._advance()
                    jobs = self._give(worker, slots, beside) if not self._ended else ()
                if self._keeper is None:
                    self._commit_now()
                left = deadline - self._clock()
                if jobs or left <= 0 or self._ended:
                    return Assignment(
                        jobs=jobs,
                        ended=self._ended,
                        lease_s=self._book.lease_s,
                        first_lease_s=self._book.first_lease_s(own_loop=self._own_loop),
                    )
                self._changed.wait(min(left, 1.0))

    def push(self, worker: str, results: Sequence[Result]) -> None:
        """Results of a worker's jobs. A second copy of a result is ignored.

        One whose lease was returned meanwhile counts, if nobody else has delivered it and its trial stands where the
        job began: it is what any worker would have given.
        """
        with self._changed:
            self._unheard.discard(worker)
            self._unkept[worker] += len(results)
            for result in results:
                self._delivered[worker] = _sort(result.key)
            if any(result.outcome == "crashed" for result in results):
                self._crashed.add(worker)
            else:
                self._crashed.discard(worker)
        if self._keeper is not None:
            self._inbox.put([(worker, result) for result in results])
        else:
            self._take_in([(worker, result) for result in results])

    def progress(self, worker: str, keys: Sequence[str], waiting: Sequence[str] = ()) -> None:
        """A worker is at work. Announces its jobs to a study that does not know of them.

        Args:
            keys: jobs of which some batches are done.
            waiting: other jobs in its hands.
        """
        with self._changed:
            self._unheard.discard(worker)
            for key in (*keys, *waiting):
                lease = self._state.leases.get(key)
                if lease is not None and lease.worker == worker:
                    self._book.heard(key, self._clock(), waiting=key not in keys)
                elif lease is None and not self._ended and worker not in self._gone and key not in self._pushed:
                    self._adopt(worker, key)

    def fetch(self, ref: str) -> bytes:
        """A blob's content.

        Raises:
            DamagedBlob: it is gone, or not what was written; it will be made again, and the job that needs it given out
                again.
            InStorage: the same, in a study that is mirrored: whoever asked reads it there.
        """
        with self._changed:
            digest = self._state.digests.get(ref, "")
        try:
            return self._blobs.fetch(ref, digest)
        except DamagedBlob as error:
            with self._changed:
                self._note_damage(error)
            raise

    def lost(self, worker: str, reason: str = "its worker was lost", *, blame_job: bool = False) -> None:
        """A worker is gone: its jobs are given out again.

        Args:
            blame_job: its process died by itself, perhaps of the job; False: its node went.
        """
        with self._changed:
            if blame_job:
                self._blame(worker, reason)
            self._let_go(worker, reason)
            self._gone.add(worker)
            self._asking.discard(worker)
            self._unheard.discard(worker)
            self._changed.notify_all()

    def workers(self) -> dict[str, Seat]:
        """Where each worker's process runs, or ran last."""
        with self._changed:
            return {
                name: Seat(node=seat.node, pid=seat.pid, alive=name not in self._gone)
                for name, seat in self._state.seats.items()
            }

    def broken(self, worker: str, error: HpsearchError) -> None:
        """A worker could not begin: the task does not load, or its data cannot be trained on."""
        self._fail(error)

    # What the driver calls

    @property
    def state(self) -> StudyState:
        """The study as it stands; read it from the driver's thread of a local study only."""
        return self._state

    @property
    def failure(self) -> HpsearchError | None:
        """Why the study stopped early, None while all is well."""
        return self._failure

    @property
    def ended(self) -> bool:
        """Whether nothing more will be given out."""
        return self._ended

    @property
    def n_events(self) -> int:
        """Events recorded so far; the same number twice means that nothing has happened."""
        return self._journal.next_seq

    def stop(self, reason: str) -> None:
        """Give out no more jobs. What has been pushed is kept; what is being trained is given out again on resume."""
        with self._changed:
            self._finish(reason)

    def close(self) -> None:
        """Keep what was pushed, and let the journal go."""
        if not self._ended:
            self.stop("interrupted")
        if self._keeper is not None:
            self._inbox.put(None)
            self._keeper.join()
        with contextlib.suppress(HpsearchError):  # what cannot be written now is told below
            self._keep_house()
        if self._mirror is not None:
            done = self._state.ended is not None and self._state.ended.reason == "done"
            behind = self._mirror.close(DRAIN_S if done else HURRIED_DRAIN_S)
            if behind is not None:
                self._tell(behind)
        self._blobs.close()
        try:
            self._journal.close()
        except HpsearchError:
            if self._failure is None:  # else the driver knows of the full disk already
                raise

    # Giving out

    def _give(self, worker: str, slots: int, beside: Job | None) -> tuple[Job, ...]:
        """Several jobs only where they are alike, as trials that begin are; the rest is for whoever comes first."""
        jobs: list[Job] = []
        data = self._state.data
        if data is not None and not data.resumable and self._unkept[worker]:
            return ()  # the trial in its memory may be told to go on
        if worker in self._crashed and self._unkept[worker]:
            return ()  # it may be the crash that ends the study, and a slow disk no reason to run into it again
        if any(self._state.is_alone(lease.key) for lease in self._neighbours(worker)):
            return ()
        held = self._held_by(worker) if self._suspects else []
        if any(lease.key in self._suspects for lease in held):
            return ()
        if beside is not None:
            slots = min(slots, self._fair_share(worker, slots))
        while len(jobs) < slots:
            job = self._next_job(worker, beside)
            if job is None or (jobs and beside is None and not _alike(jobs[0], job)):
                break
            if self._state.is_alone(job.key) and (jobs or self._neighbours(worker)):
                break  # it ran out of memory beside others: they end what they have, and nothing new is begun here
            if self._is_last_chance(job.key) and any(self._is_last_chance(n.key) for n in self._neighbours(worker)):
                break  # should the machine go down once more, there must be no doubt of what
            suspect = job.key in self._suspects
            if suspect and (jobs or held):
                break  # should this process die as well, there must be no doubt of what
            self._lease(job, worker, beside)
            self._note_budget()  # the next asks for more than what is leased by now
            jobs.append(job)
            if suspect:
                break
            if beside is None and self._delivered.get(worker, _sort(job.key)) != _sort(job.key):
                break  # how short its jobs are was measured on others
        return tuple(jobs)

    def _fair_share(self, worker: str, slots: int) -> int:
        """How many more lanes the worker may fill: the last new trials are not all for whoever asks first."""
        left = sum(stage.n_to_begin for stage in self._open_stages() if isinstance(stage, Search))
        if not left or left >= slots * len(self._asking):
            return slots
        share = math.ceil((left + len(self._state.leases)) / len(self._asking))
        return max(0, share - self._state.n_held[worker])

    def _neighbours(self, worker: str) -> list[Leased]:
        """What is being run on the worker's node, by itself too; told only when a job has done harm."""
        if not self._state.alone and not self._state.deaths:
            return []
        seats = self._state.seats
        node = seats[worker].node if worker in seats else ""
        return [
            lease
            for lease in self._state.leases.values()
            if (seats[lease.worker].node if lease.worker in seats else "") == node
        ]

    def _next_job(self, worker: str, beside: Job | None) -> Job | None:
        for stage in self._open_stages():
            if beside is None:
                job = stage.next_job(worker)
            else:
                job = stage.next_beside(worker, beside) if isinstance(stage, FillsLanes) else None
            if job is not None:
                if stage.name not in self._state.began or stage.name in self._state.ended_stages:
                    self._record(StageBegan(stage=stage.name))
                return job
        return None

    def _open_stages(self) -> list[Stage]:
        """The first stage that is not through; and those that need not wait for it: trials whose range is known, and
        the baselines, for whoever has nothing else to do."""
        rest = [stage for stage in self._stages if not self._through(stage)]
        return list(takewhile(lambda stage: stage.name in TOGETHER, rest)) or rest[:1]

    def _through(self, stage: Stage) -> bool:
        return stage.name in self._state.ended_stages

    def _lease(self, job: Job, worker: str, beside: Job | None) -> None:
        for stage in self._stages:
            drawn = stage.drawn(job) if isinstance(stage, Search) else None
            if drawn is not None:
                self._record(drawn)
        shared = "" if beside is None else beside.key
        if isinstance(job, TrainJob):
            event = Leased(
                key=job.key,
                worker=worker,
                trial=job.trial,
                from_epoch=job.from_epoch,
                to_epoch=job.to_epoch,
                beside=shared,
            )
        else:
            event = Leased(key=job.key, worker=worker, beside=shared)
        self._record(event)
        self._book.begin(job.key, self._clock())

    def _adopt(self, worker: str, key: str) -> bool:
        """Give a job to the worker that has it in its hands already, if the study would give it to anyone."""
        if key not in self._state.returned:
            return False
        event = Leased(key=key, worker=worker)
        parts = train_parts(key)
        if parts is not None:
            number, from_epoch, to_epoch = parts
            trial = self._state.trials[number]
            if not trial.open or trial.epoch != from_epoch:
                return False
            event = Leased(key=key, worker=worker, trial=number, from_epoch=from_epoch, to_epoch=to_epoch)
        self._record(event)
        self._book.begin(key, self._clock())
        self._book.heard(key, self._clock())
        return True

    def _held_by(self, worker: str) -> list[Leased]:
        return [lease for lease in self._state.leases.values() if lease.worker == worker]

    def _let_go(self, worker: str, reason: str) -> None:
        for lease in self._held_by(worker):
            self._return(lease.key, reason)
        self._forget_memory_of([worker])

    def _forget_memory_of(self, workers: Iterable[str]) -> None:
        for worker in workers:
            for stage in self._stages:
                stage.lost(worker)

    def _take_back(self) -> None:
        """What an earlier driver had given out goes to others.

        That a driver was killed says nothing of its jobs. That its machine went down does, where all were there.
        """
        leases, seats = list(self._state.leases.values()), self._state.seats
        nodes = {seats[lease.worker].node if lease.worker in seats else "" for lease in leases}
        for lease in leases:
            if self._state.machine_went and len(nodes) == 1:
                message = f"the machine went down {MOST_DEATHS} times with this job at work"
                self._blame_job(lease.key, "its machine went down", message, final=True)
            else:
                self._return(lease.key, "the driver went")

    def _blame(self, worker: str, reason: str) -> None:
        """A process died by itself; of which of several jobs, nobody knows before each has had a process of its own."""
        held = [lease.key for lease in self._held_by(worker) if lease.key not in self._pushed]
        if len(held) != 1:
            self._suspects.update(held)
            return
        cause = "out of memory, or a crash in native code"
        self._blame_job(held[0], reason, f"the worker's process died {MOST_DEATHS} times in this job ({cause})")
        self._advance()

    def _blame_job(self, key: str, reason: str, message: str, *, final: bool = False) -> None:
        """A job comes back and may be why, which the journal counts: one that kills or hangs whoever takes it is not
        given out for ever. At the third time it has crashed, with the message."""
        if self._state.deaths[key] + 1 < MOST_DEATHS:
            self._return(key, reason, blamed=True)
        elif key not in self._pushed:
            lease = self._state.leases[key]
            self._record(
                Finished(
                    key=key, worker=lease.worker, outcome="crashed", trial=lease.trial, message=message, final=final
                )
            )
            self._book.end(key)

    def _is_last_chance(self, key: str) -> bool:
        """Whether a job has crashed if it comes back once more."""
        return self._state.deaths[key] == MOST_DEATHS - 1

    def _return(self, key: str, reason: str, *, blamed: bool = False) -> None:
        if key not in self._pushed:
            self._record(Returned(key=key, worker=self._state.leases[key].worker, reason=reason, blamed=blamed))
            self._book.end(key)

    def _expire_leases(self) -> None:
        now = self._clock()
        if now - self._looked_at < LOOK_FOR_OVERDUE_S:
            return
        self._looked_at = now
        for key, limit in self._book.overdue(now, own_loop=self._own_loop):
            silence = f"no progress for {limit:.0f} s"
            if limit == INHERIT_S:
                self._return(key, silence)
            else:
                self._blame_job(key, silence, f"{silence}, {MOST_DEATHS} times")
                self._advance()
        if self._unheard and now - self._began_at > INHERIT_S:
            silent, self._unheard = self._unheard, set()
            for worker in silent:
                self._let_go(worker, "its worker is silent since the study was restarted")

    @property
    def _own_loop(self) -> bool:
        return self._state.data is not None and not self._state.data.resumable

    def _watch_budget(self) -> None:
        if self._note_budget():
            self._advance()

    def _note_budget(self) -> bool:
        """Whether a limit is reached; the stages that it bounds are told."""
        spent = Spent(
            hours=(self._state.worked_s + self._clock() - self._began_at) / 3600,
            worker_hours=self._state.busy_s(self._journal.now()) / 3600,
            epochs=self._state.n_trained_epochs + self._state.n_leased_epochs,
            out_of_room=self._state.out_of_room,
        )
        self._spent = self._spent or exhausted(self._budget, spent)
        # Folds and fresh seeds leave nothing on the disk.
        of_time = exhausted(dataclasses.replace(self._budget, disk_bytes=None), spent) if self._spent else ""
        for stage in self._stages:
            if self._spent and isinstance(stage, Search):
                stage.end_budget()
            elif of_time and isinstance(stage, Evaluate | Confirm):
                stage.end_budget(of_time)
        return bool(self._spent)

    # Taking in

    def _keep(self) -> None:
        """The keeper thread: results in, in batches; their blobs are on disk before they count."""
        while True:
            try:
                batch = self._inbox.get(timeout=COMMIT_EVERY_S)
            except queue.Empty:
                try:
                    self._keep_house()
                except HpsearchError as error:
                    self._fail(error)
                except Exception as error:
                    self._fail(internal_error(error))
                continue
            if batch is None:
                return
            while not self._inbox.empty():
                more = self._inbox.get()
                if more is None:
                    self._inbox.put(None)
                    break
                batch += more
            try:
                self._take_in(batch)
            except HpsearchError as error:
                self._fail(error)
            except Exception as error:  # a defect of ours must end the study, not leave its workers waiting
                self._fail(internal_error(error))

    def _take_in(self, batch: list[tuple[str, Result]]) -> None:
        with self._changed:
            fresh = []
            for worker, result in batch:
                if result.key in self._pushed or result.attempt in self._attempts:
                    continue
                if result.key in self._state.leases or (not self._ended and self._adopt(worker, result.key)):
                    self._pushed.add(result.key)
                    self._attempts |= {_failed_attempt(result)} - {""}
                    fresh.append((worker, result))
            fresh = [pair for pair in fresh if not self._gave_back(pair[1])]
        admission, digests = self._keep_blobs([result for _, result in fresh])
        with self._changed:
            events = [_finished(worker, result, self._state, admission, digests) for worker, result in fresh]
            for event, (worker, result) in zip(events, fresh, strict=True):
                self._record(event)
                if worker in self._gone:  # lost while its result was kept: no trial may wait for its memory
                    for stage in self._stages:
                        stage.lost(worker)
                self._pushed.discard(result.key)
                self._suspects.discard(result.key)
                self._book.heard(result.key, self._clock())
                self._book.end(result.key)
            for event in events:  # the end of the study comes after all that was known by then
                self._look_for_common_crash(event)
            for worker, _ in batch:
                self._unkept[worker] -= 1
            self._advance()
            for dropped in () if self._ended else self._keeping.sweep():
                self._record(dropped)
            self._changed.notify_all()
        self._keep_house()

    def _keep_blobs(self, results: Sequence[Result]) -> tuple[Admission, dict[str, str]]:
        """Write the blobs of some results, after room was made for their checkpoints, and tell the digests."""
        if self._keeping.is_short(results):
            self._keep_house()
        with self._changed:
            admission = self._keeping.admit(results)
            for event in admission.events:
                self._record(event)
        if admission.events:
            self._keep_house()
        kept = {
            ref: content for result in results for ref, content in result.blobs.items() if ref not in admission.unkept
        }
        self._blobs.keep(kept)
        return admission, {ref: digest_of(content) for ref, content in kept.items()}

    def _keep_house(self) -> None:
        """All that is recorded goes to disk; then the files that it says are dropped are deleted."""
        with self._changed:
            dropped = self._keeping.take_dropped()
        self._journal.commit()
        for ref in dropped:
            self._blobs.drop(ref)

    def _gave_back(self, result: Result) -> bool:
        """Whether a job came back undone, since a blob that it needs is damaged."""
        if result.outcome != "damaged":
            return False
        self._note_damage(DamagedBlob(str(result.values["ref"]), result.message))
        self._pushed.discard(result.key)
        self._return(result.key, f"{result.values['ref']} is damaged")
        return True

    def _note_damage(self, error: DamagedBlob) -> None:
        event = None if self._ended else self._keeping.damaged(error)
        if event is not None:
            self._record(event)
            failure = self._keeping.failure(error.ref)
            if failure is not None:
                self._fail_locked(failure)
            self._changed.notify_all()

    def _look_for_common_crash(self, event: Finished) -> None:
        if event.outcome == "crashed" and not event.key.startswith("fold/"):  # there it takes its config out of a race
            subject = event.key if event.trial is None else str(event.trial)
            self._crashes.append(Crash(subject=subject, message=event.message, frame=event.frame))
            error = common_crash(self._crashes, CRASHES_TO_STOP)
            if error is not None:
                self._fail_locked(error)

    # Going on

    def _advance(self) -> None:
        """Record what follows from what is known, and end the stages that are through."""
        if self._ended:
            return
        moved, concluded = True, None
        while moved and not self._ended:
            moved = False
            open_stages = self._open_stages()
            if not open_stages:
                self._end_study()
                return
            for stage in open_stages:
                for event in self._conclusions(stage):
                    assert event != concluded, f"{stage.name} concludes {event.type} twice"  # for ever, if nobody asked
                    concluded = event
                    self._record(event)
                    moved = True
            first = open_stages[0]
            if self._state.data is not None and first.finished():
                if first.name not in self._state.began:
                    self._record(StageBegan(stage=first.name))
                if isinstance(first, Preflight) and (error := first.failure()) is not None:
                    self._fail_locked(error)
                    return
                self._record(StageEnded(stage=first.name, reason=self._spent if first.name == "search" else ""))
                moved = True

    def _conclusions(self, stage: Stage) -> list[Event]:
        try:
            return stage.conclude()
        except DamagedBlob as error:
            event = self._keeping.damaged(error)
            if event is None:
                raise
            return [event]

    def _end_study(self) -> None:
        if any(stage.name == "search" for stage in self._stages) and self._state.best() is None:
            self._fail_locked(no_usable_trial(self._state), reason="no usable trial")
        else:
            self._finish("done")

    def _record(self, event: Event) -> None:
        entry = self._journal.append(event)
        self._state.apply(event, entry.time)
        for stage in self._stages:
            stage.apply(event)
        self._keeping.apply(event)

    def _tell(self, event: Event) -> None:
        """Record what the mirror has to say."""
        with self._changed:
            self._record(event)
        if self._keeper is None:  # else it commits by itself
            self._commit_now()

    def _commit_now(self) -> None:
        try:
            self._journal.commit()
        except HpsearchError as error:
            self._fail(error)

    def _fail(self, error: HpsearchError) -> None:
        with self._changed:
            self._fail_locked(error)

    def _fail_locked(self, error: HpsearchError, reason: str = "failed") -> None:
        if self._failure is None and not self._ended:
            self._failure = error
            self._finish(reason, str(error))

    def _finish(self, reason: str, message: str = "") -> None:
        if not self._ended:
            self._ended = True
            self._record(Ended(reason=reason, message=message))
            self._changed.notify_all()
            with contextlib.suppress(HpsearchError):  # of a full disk the driver is told by `failure`
                self._journal.commit()


def _alike(first: Job, job: Job) -> bool:
    """Whether two jobs take about as long."""
    if isinstance(first, TrainJob) and isinstance(job, TrainJob):
        return first.from_epoch == job.from_epoch == 0
    return first.kind == job.kind


def _sort(key: str) -> str:
    """What a job is for.

    >>> _sort("train/5/0-1")
    'train'
    """
    return key.partition("/")[0]


def _failed_attempt(result: Result) -> str:
    """What names an attempt whose job may be given out again, "" for others."""
    return result.attempt if result.outcome in ("crashed", "out_of_memory") else ""


def _finished(
    worker: str, result: Result, state: StudyState, admission: Admission, digests: Mapping[str, str]
) -> Finished:
    """The event of a result; its blobs are named, not held, in it."""
    return Finished(
        key=result.key,
        worker=worker,
        outcome=result.outcome,
        trial=state.leases[result.key].trial,
        values=admission.values(result),
        epochs=tuple((row.epoch, row.metrics, row.seconds) for row in result.epochs),
        message=result.message,
        frame=result.frame,
        traceback=result.traceback,
        seconds=round(result.seconds, 4),
        attempt=_failed_attempt(result),
        digests={**{ref: digests[ref] for ref in result.blobs if ref in digests}, **result.stored},
        stored=tuple(result.stored),
    )
