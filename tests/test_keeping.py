"""What stays in checkpoints/: no more than is needed, never more than budget.disk, and nothing that is damaged."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from hpsearch import keeping
from hpsearch.assembly import make_stages
from hpsearch.blobs import BlobStore
from hpsearch.errors import DamagedBlob, HpsearchError, JournalError, NoUsableTrial
from hpsearch.events import Damaged, Dropped, Finished, OutOfRoom, Returned
from hpsearch.fleets import Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.job import EvaluateJob, ExportJob, Job, RebuildJob, Result, TrainJob, rebuild_key
from hpsearch.journal import FILE_NAME, read_journal
from hpsearch.retention import LOOK_THROUGH, n_kept_at_most
from hpsearch.spec import Spec, parse_spec
from hpsearch.state import StudyState
from hpsearch.trial import Missing, TrialState
from tests import fakes

SPACE = """
name: keeping
task: task.py:Task
preflight: {enabled: false}
search: {trials: 27}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0}
early_stopping: {min_epochs: 1, max_epochs: 9, reduction_factor: 3}
ensemble: {pool: 6, size: 3}
"""
SIZE = 100  # bytes of a fake checkpoint
E = TypeVar("E")
TRAINED: list[TrainJob | RebuildJob] = []  # what any executor of a test was given


class Reader(fakes.FakeExecutor):
    """Reads the checkpoints that its jobs name, as a real one does, and is sure that they are the right ones."""

    def __init__(self, *, best_at_rung: bool = True, spoilt: int = -1, worse_by: float = 0.0) -> None:
        """
        Args:
            best_at_rung: False: each trial's best epoch is its first, in a file of its own.
            spoilt: the trial that cannot be trained again.
            worse_by: loss that each trial has more than the one before it.
        """
        super().__init__()
        self._best_at_rung = best_at_rung
        self._spoilt = spoilt
        self._worse_by = worse_by

    def run(
        self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
    ) -> Iterator[Result]:
        for job in jobs:
            if isinstance(job, TrainJob | RebuildJob):
                TRAINED.append(job)
            try:
                for ref in _needed(job):
                    assert fetch(ref) == _content(ref), ref
            except DamagedBlob as error:
                yield Result(key=job.key, outcome="damaged", values={"ref": error.ref}, message=error.why)
                continue
            if isinstance(job, RebuildJob):
                yield self._rebuild(job)
            else:
                (result,) = super().run([job], fetch, progress)
                yield self._graphs(job, result) if isinstance(job, ExportJob) else result

    def _rebuild(self, job: RebuildJob) -> Result:
        if job.trial == self._spoilt:
            return Result(key=job.key, outcome="crashed", message="ValueError: bad", frame="t.py:1 in model")
        blobs = {job.checkpoint: _content(job.checkpoint)}
        return Result(key=job.key, values={"best_checkpoint": job.checkpoint}, blobs=blobs)

    def _train(self, job: TrainJob) -> Result:
        result = super()._train(job)
        if result.outcome != "done":
            return result
        last = str(result.values["checkpoint"])
        best: str | None = last
        if not self._best_at_rung:
            first = f"checkpoints/trial-{job.trial:04d}-best-e0001.safetensors"
            best = first if job.from_epoch == 0 else None
        rows = []
        for row in result.epochs:
            loss = row.metrics["val_loss"] + self._worse_by * job.trial
            late = 0 if self._best_at_rung or row.epoch == 1 else 2 * row.epoch
            rows.append(dataclasses.replace(row, metrics={**row.metrics, "val_loss": loss + late}))
        values = {**result.values, "best_checkpoint": best}
        return dataclasses.replace(
            result,
            values=values,
            epochs=tuple(rows),
            blobs={ref: _content(ref) for ref in {last, best} if ref is not None},
        )

    def _graphs(self, job: ExportJob, result: Result) -> Result:
        refs = {str(m.trial): f"exports/{m.trial}.onnx" for m in job.members}
        members = {trial: {"onnx": ref, "weights": ref} for trial, ref in refs.items()}
        return dataclasses.replace(
            result, values={**result.values, "members": members}, blobs={ref: ref.encode() for ref in refs.values()}
        )


def _needed(job: Job) -> list[str]:
    match job:
        case TrainJob(checkpoint=str(ref)):
            return [ref]
        case EvaluateJob() | ExportJob():
            return [member.checkpoint for member in job.members]
    return []


def _content(ref: str) -> bytes:
    """What a checkpoint of this name must hold; their sizes differ."""
    return ref.encode().ljust(SIZE + hash_of(ref) % 20, b".")


def hash_of(ref: str) -> int:
    return sum(ref.encode())


def reader(spec: Spec, folder: Path) -> Reader:
    return Reader()


def early_reader(spec: Spec, folder: Path) -> Reader:
    return Reader(best_at_rung=False)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # what is on disk after a crash is not the question here
    TRAINED.clear()


def launch_of(run_dir: Path, *overrides: str, make_executor: Callable[[Spec, Path], Reader] = reader) -> Launch:
    return Launch(
        run_dir=run_dir,
        spec=parse_spec(SPACE, overrides=overrides),
        folder=run_dir,
        make_sampler=fakes.make_sampler,
        make_executor=make_executor,
        lock_wait_s=0,
        stages=("lr_range", "search", "ensemble"),
    )


def run(
    run_dir: Path, *overrides: str, make_executor: Callable[[Spec, Path], Reader] = reader, workers: int = 1
) -> StudyState:
    LocalFleet(launch_of(run_dir, *overrides, make_executor=make_executor), workers=workers).run(lambda entries: None)
    return state_of(run_dir)


def disk(limit: int) -> str:
    """The override that limits checkpoints/ to so many bytes."""
    return f"budget.disk={(limit + 0.5) / 1024:.6f}KiB"


def state_of(run_dir: Path) -> StudyState:
    return StudyState.of(read_journal(run_dir))


def files(run_dir: Path) -> set[str]:
    return {f"checkpoints/{path.name}" for path in (run_dir / "checkpoints").iterdir()}


def n_bytes(run_dir: Path) -> int:
    """As the folder has it; other threads may be writing."""
    total = 0
    for path in (run_dir / "checkpoints").glob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def events(run_dir: Path, kind: type[E]) -> list[E]:
    return [entry.event for entry in read_journal(run_dir) if isinstance(entry.event, kind)]


def curves(state: StudyState) -> object:
    return {n: (t.config, t.seed, t.curve, t.state) for n, t in state.trials.items()}


def outcome(state: StudyState) -> object:
    assert state.selected is not None
    assert state.compared is not None
    return curves(state), state.selected, state.compared.gain


@pytest.fixture
def watch_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Has every write look at the folder itself, with the file that is being written beside its name."""

    def watch(run_dir: Path, limit: int) -> None:
        replace = os.replace

        def checked(old: Path, new: Path) -> None:
            replace(old, new)

        def named(old: Path, new: Path) -> None:
            assert n_bytes(run_dir) <= limit
            checked(old, new)
            assert n_bytes(run_dir) <= limit

        monkeypatch.setattr(os, "replace", named)

    return watch


# Without a limit


def test_after_the_search_the_pool_and_the_lasts_of_the_best_few_are_there(tmp_path: Path) -> None:
    state = run(tmp_path, make_executor=early_reader)
    ranking = state.ranking()
    assert files(tmp_path) == {
        *(trial.best_checkpoint for trial in ranking[:6]),
        *(trial.checkpoint for trial in ranking[:3]),
    }
    assert {trial.number for trial in ranking if trial.missing is Missing.DROPPED} == {t.number for t in ranking[6:]}
    assert files(tmp_path) == set(state.owners) == {ref for ref in state.digests if ref.startswith("checkpoints/")}


@pytest.mark.parametrize("kind", ["asha", "sha", "median", "none"])
@pytest.mark.parametrize("make_executor", [reader, early_reader])
def test_no_job_of_a_search_meets_a_checkpoint_that_was_dropped_too_early(
    tmp_path: Path, kind: str, make_executor: Callable[[Spec, Path], Reader]
) -> None:
    run(tmp_path, f"early_stopping.type={kind}", "search.trials=60", make_executor=make_executor, workers=3)
    assert all(job.checkpoint is not None for job in TRAINED if isinstance(job, TrainJob) and job.from_epoch)
    assert not any(isinstance(job, RebuildJob) for job in TRAINED)
    assert events(tmp_path, Returned) == []


@pytest.mark.parametrize("seed", range(3))
def test_fewer_checkpoints_are_kept_than_was_forecast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    most = 0
    keep = BlobStore.keep

    def counted(store: BlobStore, blobs: dict[str, bytes]) -> None:
        nonlocal most
        keep(store, blobs)
        most = max(most, len(list((tmp_path / "checkpoints").glob("*"))))

    monkeypatch.setattr(BlobStore, "keep", counted)
    run(tmp_path, f"seed={seed}", "search.trials=300", make_executor=early_reader)
    forecast = n_kept_at_most(300, (1, 3), 3, pool=6, size=3, overtaken=1.2)
    assert forecast / 3 < most <= forecast


def test_looking_for_what_can_go_costs_each_result_about_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    price = keeping.Keeping._price
    n_asked = 0

    def counted(self: keeping.Keeping, ref: str) -> object:
        nonlocal n_asked
        n_asked += 1
        return price(self, ref)

    monkeypatch.setattr(keeping.Keeping, "_price", counted)
    for n_trials, limit in ((100, ""), (1000, ""), (1000, "budget.disk=20KiB")):
        n_asked = 0
        run_dir = tmp_path / f"{n_trials}{limit}"
        run(run_dir, f"search.trials={n_trials}", *([limit] if limit else []))
        counts.append(n_asked / len(events(run_dir, Finished)))
    assert max(counts) < 3 * LOOK_THROUGH


# Within a limit


@pytest.mark.parametrize("make_executor", [reader, early_reader])
@pytest.mark.parametrize("room", [3.7, 4.4, 6, 9, 14, 25, 60])
def test_limit_is_never_exceeded_and_changes_no_trial(
    tmp_path: Path,
    watch_disk: Callable[[Path, int], None],
    room: float,
    make_executor: Callable[[Spec, Path], Reader],
) -> None:
    free = run(tmp_path / "free", make_executor=make_executor)
    TRAINED.clear()
    limit = int(room * (SIZE + 20))
    watch_disk(tmp_path / "tight", limit)
    tight = run(tmp_path / "tight", disk(limit), make_executor=make_executor)
    assert tight.done
    assert curves(tight) == curves(free)
    assert tight.budget_spent == ""
    assert tight.best() is not None
    assert tight.best().number == free.best().number  # type: ignore[union-attr]
    assert len(tight.selected.pool) >= 3  # type: ignore[union-attr]
    assert all(tight.trials[number].best_checkpoint is not None for number in tight.selected.pool)  # type: ignore[union-attr]
    assert not any(isinstance(job, RebuildJob) for job in TRAINED)  # for which there would be no room either
    if room >= 9:
        assert tight.selected == free.selected
    assert files(tmp_path / "tight") == set(tight.owners)


def test_limit_holds_for_several_workers_and_batches(tmp_path: Path, watch_disk: Callable[[Path, int], None]) -> None:
    watch_disk(tmp_path, 700)
    state = run(tmp_path, disk(700), "search.trials=60", workers=5)
    assert state.done
    assert len(state.trials) == 60


def test_room_that_the_indispensable_fill_ends_the_search_and_the_ensemble_still_comes(
    tmp_path: Path, watch_disk: Callable[[Path, int], None]
) -> None:
    watch_disk(tmp_path, 260)
    state = run(tmp_path, disk(260))
    assert state.done
    assert state.budget_spent == "budget.disk: 260 bytes, which holds no more checkpoints"
    (full,) = events(tmp_path, OutOfRoom)
    refused = state.trials[int(full.ref[18:22])]
    assert refused.curve  # what could not be kept counts all the same
    assert refused.missing is Missing.NO_ROOM
    assert not any(isinstance(job, RebuildJob) for job in TRAINED)
    assert state.selected is not None
    assert len(state.selected.pool) == 2
    assert all(state.trials[trial].best_checkpoint is not None for trial in state.selected.pool)


def test_checkpoint_larger_than_the_limit_leaves_a_curve_and_no_usable_trial(tmp_path: Path) -> None:
    with pytest.raises(NoUsableTrial) as raised:
        run(tmp_path, disk(90))
    state = state_of(tmp_path)
    assert [len(trial.curve) for trial in state.trials.values()] == [1]
    assert n_bytes(tmp_path) == 0 if (tmp_path / "checkpoints").exists() else True
    assert raised.value.hint == "raise budget.disk: it does not hold one checkpoint"


def test_larger_limit_goes_on_to_what_the_study_would_have_been(tmp_path: Path) -> None:
    free = run(tmp_path / "free")
    run(tmp_path / "tight", disk(260))
    again = run(tmp_path / "tight", "budget.disk=1MiB")
    assert curves(again) == curves(free)
    assert again.selected == free.selected
    assert again.budget_spent == ""


def test_smaller_limit_is_kept_from_the_first_moment_on(
    tmp_path: Path, watch_disk: Callable[[Path, int], None]
) -> None:
    free = run(tmp_path / "free")
    run(tmp_path / "shrunk")
    watch_disk(tmp_path / "shrunk", 500)
    again = run(tmp_path / "shrunk", disk(500), "search.trials=40")
    assert n_bytes(tmp_path / "shrunk") <= 500
    assert all(again.trials[n].curve[: len(t.curve)] == t.curve for n, t in free.trials.items())


def test_trial_that_is_worse_than_all_that_fits_pushes_nothing_out(tmp_path: Path) -> None:
    state = run(tmp_path, disk(480), "early_stopping.type=none", "search.trials=12")
    refused = [event for event in events(tmp_path, Finished) if event.values.get("unkept")]
    dropped = [ref for event in events(tmp_path, Dropped) for ref in event.refs]
    kept = sorted(t.sort_key for t in state.trials.values() if t.best_checkpoint is not None)
    assert len(kept) == 4
    assert refused
    for number in [*(event.trial for event in refused), *(int(ref[18:22]) for ref in dropped)]:
        assert number is not None
        assert state.trials[number].sort_key > kept[-1]


# Crashes


def test_files_that_no_event_names_are_deleted_when_a_study_is_taken_up(tmp_path: Path) -> None:
    state = run(tmp_path)
    strays = ["trial-0099-e0001.safetensors", "trial-0001-e0001.safetensors.part"]
    for name in strays:
        (tmp_path / "checkpoints" / name).write_bytes(b"1")
    run(tmp_path)
    assert files(tmp_path) == set(state.owners)


@pytest.mark.parametrize("limit", [None, 500])
def test_study_killed_before_any_deletion_goes_on_without_a_dangling_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    overrides = [disk(limit)] if limit else []
    whole = run(tmp_path / "whole", *overrides)
    n_drops = 0
    drop = BlobStore.drop

    class Killed(BaseException):
        pass

    def deadly(store: BlobStore, ref: str) -> None:
        nonlocal n_drops
        n_drops += 1
        if n_drops > lives:
            raise Killed
        drop(store, ref)

    for lives in range(0, 40, 3):
        n_drops = 0
        run_dir = tmp_path / f"{lives}"
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(BlobStore, "drop", deadly)
            patch.setattr(BlobStore, "close", lambda store: None)
            run(run_dir, *overrides)
        named = {ref for t in state_of(run_dir).trials.values() for ref in (t.checkpoint, t.best_checkpoint) if ref}
        assert named <= files(run_dir)
        again = run(run_dir, *overrides)
        assert curves(again) == curves(whole)
        assert events(run_dir, Damaged) == []
        assert files(run_dir) == set(again.owners)


def test_journal_that_ends_before_a_result_leaves_no_file_behind(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    lines = (tmp_path / "whole" / FILE_NAME).read_bytes().splitlines(keepends=True)
    for n_lines in range(4, len(lines), 7):
        cut = tmp_path / f"{n_lines}"
        shutil.copytree(tmp_path / "whole", cut)
        (cut / FILE_NAME).write_bytes(b"".join(lines[:n_lines]))
        again = run(cut)
        assert curves(again) == curves(whole)
        assert again.selected == whole.selected
        assert files(cut) == set(again.owners)


# Growing


def test_promoted_trials_of_a_study_that_grew_are_trained_again_from_the_start(tmp_path: Path) -> None:
    def later_is_worse(spec: Spec, folder: Path) -> Reader:
        return Reader(worse_by=1.0)

    small = run(tmp_path, make_executor=later_is_worse)
    paused = {n for n, trial in small.trials.items() if trial.epoch == 1}
    TRAINED.clear()
    grown = run(tmp_path, "search.trials=81", make_executor=later_is_worse)
    again = [j for j in TRAINED if isinstance(j, TrainJob) and j.from_epoch and j.trial in paused]
    assert len(again) > 3
    assert [job.checkpoint for job in again if job.from_epoch == 1] == [None] * len(again)
    for number, trial in small.trials.items():
        assert grown.trials[number].curve[: len(trial.curve)] == trial.curve
    assert all([row.epoch for row in t.curve] == [*range(1, t.epoch + 1)] for t in grown.trials.values())


def test_wider_pool_is_what_it_would_have_been_from_the_start(tmp_path: Path) -> None:
    run(tmp_path / "grown")
    TRAINED.clear()
    grown = run(tmp_path / "grown", "ensemble.pool=12")
    fresh = run(tmp_path / "fresh", "ensemble.pool=12")
    assert outcome(grown) == outcome(fresh)
    rebuilt = [job.trial for job in TRAINED if isinstance(job, RebuildJob)]
    assert rebuilt == [trial.number for trial in fresh.ranking()[6:12]]


# Damage

DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "gone": lambda path: path.unlink(),
}


def stop_after(run_dir: Path, n_results: int) -> StudyState:
    """A study that was interrupted when so many results had come in."""
    study = launch_of(run_dir).open_study(background=False)
    executor = Reader()
    study.arriving("w")
    study.hello("w", executor.describe())
    for _ in range(n_results):
        (job,) = study.pull("w").jobs
        study.push("w", list(executor.run([job], study.fetch, lambda key, epoch: None)))
    study.close()
    return state_of(run_dir)


def copy_until(whole: Path, to: Path, event_type: str, but: int = 0) -> None:
    """A study as it was after the first event of a type, or so many events before."""
    shutil.copytree(whole, to)
    place = next(i for i, entry in enumerate(read_journal(whole)) if entry.event.type == event_type)
    lines = (whole / FILE_NAME).read_bytes().splitlines(keepends=True)
    (to / FILE_NAME).write_bytes(b"".join(lines[: place + 1 - but]))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_last_checkpoint_is_trained_again_and_no_curve_changes(tmp_path: Path, damage: str) -> None:
    whole = run(tmp_path / "whole")
    run_dir = tmp_path / "hurt"
    state = stop_after(run_dir, 12)
    for ref in state.owners:
        DAMAGES[damage](run_dir / ref)
    TRAINED.clear()
    again = run(run_dir)
    assert outcome(again) == outcome(whole)
    damaged = events(run_dir, Damaged)
    assert damaged
    assert len({event.ref for event in damaged}) == len(damaged)  # each is told once
    assert {trial.crashes for trial in again.trials.values()} == {0}
    assert not any(event.outcome in ("crashed", "damaged") for event in events(run_dir, Finished))
    (given_back,) = [e.key for e in events(run_dir, Returned) if "damaged" in e.reason and e.key.startswith("train/")]
    assert [job.checkpoint is None for job in TRAINED if job.key == given_back] == [False, True]
    assert files(run_dir) == set(again.owners)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_best_checkpoints_are_rebuilt_before_the_ensemble_is_chosen(tmp_path: Path, damage: str) -> None:
    whole = run(tmp_path / "whole")
    n_trained = sum(1 for job in TRAINED if isinstance(job, TrainJob))
    run_dir = tmp_path / "hurt"
    state = stop_after(run_dir, n_trained)
    assert state.search_ended
    hurt = [trial for trial in state.ranking() if trial.best_checkpoint][:4]
    for trial in hurt:
        DAMAGES[damage](run_dir / str(trial.best_checkpoint))
    TRAINED.clear()
    again = run(run_dir)
    assert outcome(again) == outcome(whole)
    assert [(job.key, job.checkpoint) for job in TRAINED] == [
        (f"rebuild/{trial.number}/{trial.best_epoch}", trial.best_checkpoint) for trial in hurt
    ]
    assert [event.ref for event in events(run_dir, Damaged)] == [trial.best_checkpoint for trial in hurt]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("folder", ["predictions", "exports", "checkpoints"])
def test_damage_to_what_the_ensemble_left_is_mended_on_resume(tmp_path: Path, folder: str, damage: str) -> None:
    whole = run(tmp_path / "whole")
    run_dir = tmp_path / "hurt"
    shutil.copytree(tmp_path / "whole", run_dir)
    for path in (run_dir / folder).iterdir():
        DAMAGES[damage](path)
    # Another pool asks for everything once more; the package alone is asked for anyway.
    overrides = [] if folder == "exports" else ["ensemble.pool=5"]
    again = run(run_dir, *overrides)
    fresh = run(tmp_path / "fresh", *overrides)
    assert outcome(again) == outcome(fresh)
    assert again.done
    assert {event.ref.split("/")[0] for event in events(run_dir, Damaged)} <= {folder}
    for path in (run_dir / "exports").iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / "exports" / path.name).read_bytes()
    assert whole.selected is not None


def test_predictions_damaged_before_the_choice_are_made_again(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    for damage, break_it in DAMAGES.items():
        cut = tmp_path / damage
        copy_until(tmp_path / "whole", cut, "selected", but=1)
        for path in [*(cut / "predictions").iterdir()][::2]:
            break_it(path)
        again = run(cut)
        assert outcome(again) == outcome(whole)
        assert events(cut, Damaged)


def test_candidate_that_cannot_be_rebuilt_makes_room_for_the_next(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    n_trained = sum(1 for job in TRAINED if isinstance(job, TrainJob))
    run_dir = tmp_path / "hurt"
    state = stop_after(run_dir, n_trained)
    best = state.ranking()[0]
    (run_dir / str(best.best_checkpoint)).unlink()
    again = run(run_dir, make_executor=lambda spec, folder: Reader(spoilt=best.number))
    assert again.done
    assert again.trials[best.number].missing is Missing.SPOILT
    assert again.selected is not None
    assert best.number not in again.selected.pool
    assert again.selected.best == state.ranking()[1].number
    assert again.trials[best.number].state is TrialState.COMPLETE


def test_member_that_cannot_be_rebuilt_has_the_ensemble_chosen_again(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    assert whole.selected is not None
    member = whole.trials[whole.selected.members[0][0]]
    run_dir = tmp_path / "hurt"
    copy_until(tmp_path / "whole", run_dir, "selected")
    (run_dir / str(member.best_checkpoint)).unlink()
    again = run(run_dir, make_executor=lambda spec, folder: Reader(spoilt=member.number))
    assert again.done
    assert again.selected is not None
    assert member.number not in dict(again.selected.members)
    assert again.compared is not None


def test_chosen_trial_is_kept_wherever_it_ranks(tmp_path: Path) -> None:
    run(tmp_path)
    spec = parse_spec(SPACE, overrides=["ensemble.pool=2", "ensemble.size=1"])
    state, blobs = StudyState(), BlobStore(tmp_path)
    stages = make_stages(spec, state, fakes.make_sampler(spec), blobs, ("search", "ensemble"))
    for entry in read_journal(tmp_path):
        state.apply(entry.event, entry.time)
        for stage in stages:
            stage.apply(entry.event)
    fifth = state.ranking()[4]
    assert state.selected is not None
    state.selected = dataclasses.replace(state.selected, best=fifth.number, members=((fifth.number, 1.0),))
    (dropped,) = keeping.Keeping(state, blobs, stages).sweep()
    assert isinstance(dropped, Dropped)
    kept = {number for ref, number in state.owners.items() if ref not in dropped.refs}
    assert kept == {trial.number for trial in state.ranking()[:2]} | {fifth.number}


def test_checkpoint_that_was_trained_again_is_kept_wherever_it_ranks(tmp_path: Path) -> None:
    """Somebody asked for it; dropped, it would be asked for, trained and dropped for ever."""
    run(tmp_path)
    spec = parse_spec(SPACE, overrides=["ensemble.pool=2", "ensemble.size=1"])
    state, blobs = StudyState(), BlobStore(tmp_path)
    stages = make_stages(spec, state, fakes.make_sampler(spec), blobs, ("search", "ensemble"))
    for entry in read_journal(tmp_path):
        state.apply(entry.event, entry.time)
        for stage in stages:
            stage.apply(entry.event)
    fifth, held = state.ranking()[4], keeping.Keeping(state, blobs, stages)
    dropped = Dropped(refs=(str(fifth.best_checkpoint),))
    state.selected = None
    rebuilt = Finished(
        key=rebuild_key(fifth.number, fifth.best_epoch or 0),
        worker="w",
        outcome="done",
        values={"best_checkpoint": fifth.best_checkpoint},
    )
    for event in (dropped, rebuilt):
        state.apply(event, 0.0)
        held.apply(event)
    (swept,) = held.sweep()
    assert isinstance(swept, Dropped)
    kept = {number for ref, number in state.owners.items() if ref not in swept.refs}
    assert kept == {trial.number for trial in state.ranking()[:2]} | {fifth.number}


def test_blob_that_is_damaged_again_and_again_blames_the_disk(tmp_path: Path) -> None:
    class Rotten(Reader):
        def run(
            self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
        ) -> Iterator[Result]:
            for job in jobs:
                if isinstance(job, EvaluateJob):
                    for path in (tmp_path / "checkpoints").iterdir():
                        path.write_bytes(b"rot")
                yield from super().run([job], fetch, progress)

    with pytest.raises(JournalError) as raised:
        run(tmp_path, make_executor=lambda spec, folder: Rotten())
    assert raised.value.message.endswith("was damaged 3 times since this launch began")
    assert raised.value.hint.startswith("is the disk sound?")


def test_damage_that_a_worker_alone_can_see_is_believed(tmp_path: Path) -> None:
    told = []

    class Suspicious(Reader):
        def run(
            self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
        ) -> Iterator[Result]:
            for job in jobs:
                if isinstance(job, TrainJob) and job.checkpoint is not None and not told:
                    told.append(job)
                    yield Result(
                        key=job.key, outcome="damaged", values={"ref": job.checkpoint}, message="it holds weights alone"
                    )
                else:
                    yield from super().run([job], fetch, progress)

    state = run(tmp_path, make_executor=lambda spec, folder: Suspicious())
    assert state.done
    (damaged,) = events(tmp_path, Damaged)
    assert (damaged.ref, damaged.message) == (told[0].checkpoint, "it holds weights alone")


def test_random_damage_and_interruptions_leave_the_study_as_it_would_have_been(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    rng = random.Random(7)
    run_dir = tmp_path / "hurt"
    for _ in range(12):
        study = launch_of(run_dir).open_study(background=False)
        executor = Reader()
        study.arriving("w")
        study.hello("w", executor.describe())
        for _ in range(rng.randrange(8)):
            for job in study.pull("w").jobs:
                study.push("w", list(executor.run([job], study.fetch, lambda key, epoch: None)))
            if rng.random() < 0.3:
                for path in [p for p in run_dir.glob("*/*") if p.is_file()]:
                    if rng.random() < 0.4:
                        DAMAGES[rng.choice([*DAMAGES])](path)
        with contextlib.suppress(HpsearchError):
            study.close()
    assert outcome(run(run_dir)) == outcome(whole)
