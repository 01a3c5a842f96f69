"""The ensemble stage: chosen on one split, measured once on another, never on what it was chosen by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from hpsearch.assembly import open_study
from hpsearch.blobs import BlobStore
from hpsearch.errors import NoUsableTrial
from hpsearch.events import (
    Compared,
    DataSeen,
    Dropped,
    Event,
    Finished,
    Leased,
    Opened,
    Returned,
    Selected,
    StageBegan,
    StageEnded,
    TrialDrawn,
)
from hpsearch.fleets import Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.job import Config, EvaluateJob, ExportJob, Job, Outcome, RebuildJob, Result, TrainJob
from hpsearch.journal import read_journal
from hpsearch.spec import Spec, parse_spec
from hpsearch.stages.ensemble import EnsembleSettings, EnsembleStage
from hpsearch.state import StudyState
from tests import fakes

SPEC = {
    "metric": {"name": "val_loss", "goal": "minimize"},
    "early_stopping": {"max_epochs": 9},
    "ensemble": {"pool": 3, "size": 2},
}
ROWS = {"train": 300, "val": 120, "ensemble": 120, "test": 120}


@dataclass
class Bench:
    """The stage after a search, driven by hand. `read` holds the references that it looked into."""

    losses: Mapping[int, float] = field(default_factory=lambda: {0: 0.3, 1: 0.1, 2: 0.2, 3: 0.4, 4: 0.5})
    diverged: Sequence[int] = ()
    unusable: Sequence[int] = ()
    pool: int = 3
    size: int = 2
    combine: bool = True
    test: bool = True
    configs: Mapping[int, Config] = field(default_factory=dict)
    state: StudyState = field(default_factory=StudyState)
    blobs: dict[str, bytes] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = {name: n for name, n in ROWS.items() if name != "test" or self.test}
        info = {**vars(fakes.FakeExecutor().describe()), "n_rows": rows}
        self.stage = self.stage_of(len(self.losses))
        self.tell(Opened(study="s", uid="u", spec=SPEC, spec_text=""), DataSeen(info=info), StageBegan(stage="search"))
        for trial, loss in self.losses.items():
            self.train(trial, 1, loss)
        self.tell(StageEnded(stage="search"))

    def stage_of(self, n_trials: int) -> EnsembleStage:
        settings = EnsembleSettings(
            pool=self.pool,
            size=self.size,
            n_trials=n_trials,
            study_seed=0,
            metric="loss",
            goal="minimize",
            combine=self.combine,
        )
        return EnsembleStage(settings, self.state, arrays=self._arrays)

    def train(self, trial: int, epoch: int, loss: float) -> None:
        """One more epoch, then the end that this trial is to have."""
        key = f"train/{trial}/{epoch - 1}-{epoch}"
        ref = f"checkpoints/{trial}-{epoch}"
        values = {} if trial in self.unusable else {"checkpoint": ref, "best_checkpoint": ref}
        if trial not in self.state.trials:
            self.tell(TrialDrawn(trial=trial, config=self.configs.get(trial, {"lr": 0.1}), seed=trial))
        self.tell(
            Leased(key=key, worker="w", trial=trial, from_epoch=epoch - 1, to_epoch=epoch),
            Finished(
                key=key,
                worker="w",
                outcome="done",
                trial=trial,
                values=values,
                epochs=((epoch, {"val_loss": loss}, 0.1),),
            ),
        )
        if trial in self.diverged:
            again = f"train/{trial}/{epoch}-9"
            self.tell(
                Leased(key=again, worker="w", trial=trial, from_epoch=epoch, to_epoch=9),
                Finished(key=again, worker="w", outcome="diverged", trial=trial, message="val_loss is nan"),
            )

    def _arrays(self, ref: str) -> dict[str, np.ndarray]:
        from safetensors.numpy import load

        self.read.append(ref)
        return load(self.blobs[ref])

    def tell(self, *events: Event) -> None:
        for event in events:
            self.state.apply(event, 0.0)
            self.stage.apply(event)

    def take(self) -> Job | None:
        job = self.stage.next_job("w")
        if job is not None:
            self.tell(Leased(key=job.key, worker="w"))
        return job

    def finish(self, job: Job, outcome: Outcome = "done") -> None:
        (result,) = fakes.FakeExecutor().run([job], lambda ref: b"", lambda key, epoch: None)
        assert isinstance(result, Result)
        self.blobs.update(result.blobs)
        values = result.values if outcome == "done" else {}
        self.tell(Finished(key=job.key, worker="w", outcome=outcome, values=values))
        self.conclude()

    def conclude(self) -> None:
        while events := self.stage.conclude():
            self.tell(*events)

    def run(self, outcome_of: Callable[[Job], Outcome] = lambda job: "done") -> list[Job]:
        """All jobs, in order."""
        self.conclude()
        jobs = []
        while (job := self.take()) is not None:
            jobs.append(job)
            self.finish(job, outcome_of(job))
        return jobs

    @property
    def selected(self) -> Selected:
        assert self.state.selected is not None
        return self.state.selected

    @property
    def compared(self) -> Compared:
        assert self.state.compared is not None
        return self.state.compared


def test_pool_is_the_best_usable_trials_best_first() -> None:
    assert [trial.number for trial in Bench().stage.pool()] == [1, 2, 0]


def test_equal_trials_enter_the_pool_by_number() -> None:
    assert [trial.number for trial in Bench({3: 0.1, 1: 0.1, 2: 0.1, 0: 0.2}).stage.pool()] == [1, 2, 3]


def test_trial_without_a_checkpoint_is_no_candidate() -> None:
    assert [trial.number for trial in Bench(unusable=[1]).stage.pool()] == [2, 0, 3]


def test_diverged_trial_with_a_checkpoint_comes_after_all_others() -> None:
    bench = Bench({0: 0.3, 1: 0.1, 2: 0.2}, diverged=[1])
    assert [trial.number for trial in bench.stage.pool()] == [2, 0, 1]
    bench.run()
    assert bench.selected.best == 2
    assert 1 in bench.selected.pool


def test_pool_of_diverged_trials_alone_is_better_than_none() -> None:
    bench = Bench({0: 0.3, 1: 0.1}, diverged=[0, 1])
    bench.run()
    assert bench.selected.best == 1
    assert bench.stage.finished()


def test_candidates_are_judged_on_the_ensemble_split_and_nothing_else_is_read() -> None:
    bench = Bench()
    bench.conclude()
    for trial in (1, 2, 0):
        assert bench.state.selected is None
        job = bench.take()
        assert isinstance(job, EvaluateJob)
        assert (job.split, job.keep_predictions) == ("ensemble", True)
        assert [(m.trial, m.checkpoint) for m in job.members] == [(trial, f"checkpoints/{trial}-1")]
        bench.finish(job)
    assert bench.selected.pool == (1, 2, 0)
    assert bench.read
    assert all(ref.startswith("predictions/evaluate-ensemble-") for ref in bench.read)


def test_test_split_is_not_asked_for_before_the_members_are_chosen() -> None:
    bench = Bench()
    jobs = [bench.take() for _ in range(3)]
    assert bench.take() is None  # every candidate is in a worker's hands, and nothing else may begin
    for job in jobs:
        assert isinstance(job, EvaluateJob)
        assert job.split == "ensemble"
        bench.finish(job)
    splits = [job.split for job in bench.run() if isinstance(job, EvaluateJob)]
    assert sorted(splits) == ["test", "test", "val"]


def test_test_split_is_opened_once_for_the_best_and_once_for_the_ensemble() -> None:
    bench = Bench()
    jobs = bench.run()
    tested = [job for job in jobs if isinstance(job, EvaluateJob) and job.split == "test"]
    assert [[member.trial for member in job.members] for job in tested] == [
        [bench.selected.best],
        [trial for trial, _ in bench.selected.members],
    ]
    assert not any(job.keep_predictions for job in tested)
    assert bench.take() is None
    assert bench.stage.finished()


def test_selection_is_the_same_whatever_order_the_predictions_come_in() -> None:
    forwards, backwards = Bench(), Bench()
    forwards.run()
    jobs = [backwards.take() for _ in range(3)]
    for job in reversed(jobs):
        assert job is not None
        backwards.finish(job)
    assert backwards.selected == forwards.selected


def test_ensemble_has_no_more_members_than_its_size() -> None:
    for size in (1, 2, 3):
        bench = Bench({n: 0.1 * n for n in range(8)}, pool=8, size=size)
        bench.run()
        assert 1 <= len(bench.selected.members) <= size
        assert sum(weight for _, weight in bench.selected.members) == pytest.approx(1.0)


def test_fewer_usable_trials_than_the_size_are_enough() -> None:
    bench = Bench({0: 0.2, 1: 0.1}, unusable=[1], size=5)
    bench.run()
    assert bench.selected.members == ((0, 1.0),)
    assert bench.compared.gain["value"] == 0.0
    assert bench.stage.finished()


def test_gain_is_ensemble_minus_best_on_the_test_split() -> None:
    bench = Bench()
    bench.run()
    scores = {
        key.split("/")[2]: result.values["metrics"]["loss"]  # type: ignore[index]
        for key, result in bench.state.results.items()
        if key.startswith("evaluate/test/")
    }
    assert bench.compared.gain["metric"] == "loss"
    members = next(name for name in scores if name != str(bench.selected.best))
    assert bench.compared.gain["value"] == pytest.approx(scores[members] - scores[str(bench.selected.best)])
    assert set(bench.compared.intervals) == {"best", "ensemble"}


def test_without_a_test_split_nothing_is_claimed() -> None:
    bench = Bench(test=False)
    jobs = bench.run()
    assert {job.split for job in jobs if isinstance(job, EvaluateJob)} == {"ensemble", "val"}
    assert bench.state.compared is not None
    assert (bench.state.compared.gain, bench.state.compared.intervals) == ({}, {})
    assert bench.state.beats_baseline is None
    assert bench.stage.finished()
    assert bench.stage.conclude() == []


def test_members_are_exported_in_one_job_with_their_best_checkpoints() -> None:
    bench = Bench()
    exports = [job for job in bench.run() if isinstance(job, ExportJob)]
    assert len(exports) == 1
    assert [(m.trial, m.checkpoint, m.weight) for m in exports[0].members] == [
        (trial, f"checkpoints/{trial}-1", weight) for trial, weight in bench.selected.members
    ]


def test_switched_off_ensemble_measures_and_exports_the_best_trial_alone() -> None:
    bench = Bench(combine=False)
    jobs = bench.run()
    assert bench.selected.members == ((1, 1.0),)
    assert bench.selected.pool == (1,)
    assert sorted(job.key for job in jobs) == ["evaluate/test/1", "evaluate/val/1", "export/1"]
    assert bench.compared.gain["value"] == 0.0
    assert bench.stage.finished()


def test_search_that_left_nothing_leaves_nothing_to_do() -> None:
    bench = Bench(unusable=range(5))
    assert bench.run() == []
    assert bench.stage.finished()
    assert bench.state.selected is None


def test_candidate_that_cannot_be_evaluated_is_left_out() -> None:
    bench = Bench()
    bench.run(lambda job: "crashed" if job.key == "evaluate/ensemble/1" else "done")
    assert {trial for trial, _ in bench.selected.members} <= {2, 0}
    assert bench.stage.finished()


def test_stage_ends_when_no_candidate_can_be_evaluated() -> None:
    bench = Bench()
    bench.run(lambda job: "crashed")
    assert bench.state.selected is None
    assert bench.stage.finished()


def test_test_job_that_crashed_ends_in_no_claim() -> None:
    bench = Bench()
    bench.run(lambda job: "crashed" if job.key.startswith("evaluate/test/") else "done")
    assert bench.compared.gain == {}
    assert bench.stage.finished()


def test_lost_job_is_given_out_again() -> None:
    bench = Bench()
    job = bench.take()
    assert job is not None
    assert bench.take() != job
    bench.tell(Returned(key=job.key, worker="w", reason="lost"))
    assert bench.take() == job


# A study that grows


# Jobs for a program's free lanes


def beside(bench: Bench, job: Job) -> Job | None:
    found = bench.stage.next_beside("w", job)
    if found is not None:
        bench.tell(Leased(key=found.key, worker="w", beside=job.key))
    return found


def keys(*jobs: Job | None) -> list[str]:
    return [job.key for job in jobs if job is not None]


def test_free_lanes_get_the_candidates_of_the_group_best_first() -> None:
    bench = Bench(pool=5, configs={trial: {"lr": 0.1 * (trial + 1), "width": 8 + trial % 2} for trial in range(5)})
    first = bench.take()
    assert first is not None
    found = [beside(bench, first), beside(bench, first)]
    assert keys(first, *found) == ["evaluate/ensemble/1", "evaluate/ensemble/3"]
    assert found[1] is None
    second = bench.take()
    assert second is not None
    assert keys(second, beside(bench, second), beside(bench, second)) == [
        "evaluate/ensemble/2",
        "evaluate/ensemble/0",
        "evaluate/ensemble/4",
    ]
    assert bench.take() is None


def test_candidate_whose_checkpoint_is_missing_waits_for_its_rebuild() -> None:
    bench = Bench()
    first = bench.take()
    assert first is not None
    bench.tell(Dropped(refs=("checkpoints/2-1",)))
    assert keys(beside(bench, first), beside(bench, first)) == ["evaluate/ensemble/0"]
    rebuild = bench.take()
    assert isinstance(rebuild, RebuildJob)
    assert bench.take() is None


def test_best_and_ensemble_share_no_program_and_what_is_exported_neither() -> None:
    bench = Bench()
    bench.conclude()
    while (job := bench.take()) is not None and bench.state.selected is None:
        bench.finish(job)
    assert isinstance(job, ExportJob)
    assert beside(bench, job) is None
    best = bench.take()
    assert isinstance(best, EvaluateJob)
    assert best.split == "test"
    assert beside(bench, best) is None


def grow(bench: Bench) -> None:
    bench.tell(StageEnded(stage="ensemble"), StageBegan(stage="search"))


def test_more_trials_are_chosen_from_again() -> None:
    bench = Bench()
    bench.run()
    bench.stage = bench.stage_of(6)
    assert not bench.stage.finished()
    assert [type(event) for event in bench.stage.conclude()] == [Selected]
    grow(bench)
    bench.train(5, 1, 0.01)
    bench.tell(StageEnded(stage="search"))
    bench.run()
    assert bench.selected.n_trials == 6
    assert bench.selected.best == 5
    assert bench.selected.pool == (5, 1, 2)
    assert bench.compared.n_trials == 6
    assert bench.stage.finished()


def test_trial_that_trained_on_is_measured_again_with_its_new_checkpoint() -> None:
    bench = Bench()
    bench.run()
    grow(bench)
    bench.train(1, 2, 0.05)
    bench.tell(StageEnded(stage="search"))
    jobs = [job for job in bench.run() if isinstance(job, EvaluateJob) and job.key == "evaluate/ensemble/1"]
    assert [job.members[0].checkpoint for job in jobs] == ["checkpoints/1-2"]


def test_other_settings_of_the_ensemble_choose_again_from_the_same_predictions() -> None:
    bench = Bench(size=1)
    bench.run()
    assert len(bench.selected.members) == 1
    bench.tell(Opened(study="s", uid="u", spec={**SPEC, "ensemble": {"pool": 3, "size": 3}}, spec_text=""))
    bench.size = 3
    bench.stage = bench.stage_of(5)
    assert not bench.stage.finished()
    jobs = bench.run()
    assert len(bench.selected.members) > 1
    assert not any(job.split == "ensemble" for job in jobs if isinstance(job, EvaluateJob))


def test_resume_with_the_same_settings_leaves_the_choice_as_it_is() -> None:
    bench = Bench()
    bench.run()
    before = bench.selected
    bench.tell(Opened(study="s", uid="u", spec=SPEC, spec_text=""))
    assert bench.stage_of(5).finished()
    assert bench.state.selected is before


# Whole studies

SPACE = """
name: whole
task: task.py:Task
preflight: {enabled: false}
search: {trials: 9}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0}
early_stopping: {min_epochs: 1, max_epochs: 9, reduction_factor: 3}
ensemble: {pool: 4, size: 3}
"""


def whole(run_dir: Path, *overrides: str) -> StudyState:
    launch = Launch(
        run_dir=run_dir,
        spec=parse_spec(SPACE, overrides=overrides),
        folder=run_dir,
        make_sampler=fakes.make_sampler,
        make_executor=fakes.make_executor,
        lock_wait_s=0,
    )
    LocalFleet(launch).run(lambda entries: None)
    return StudyState.of(read_journal(run_dir))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["ensemble.size=1"], ["ensemble.size=3"]),
        (["ensemble.size=3"], ["ensemble.size=1"]),
        (["ensemble.pool=3"], ["ensemble.pool=6"]),
    ],
    ids=["larger", "smaller", "more candidates"],
)
def test_resume_with_another_ensemble_gives_what_a_fresh_study_gives(
    tmp_path: Path, first: list[str], then: list[str]
) -> None:
    whole(tmp_path / "run", *first)
    resumed, fresh = whole(tmp_path / "run", *then), whole(tmp_path / "fresh", *then)
    assert resumed.done
    assert resumed.selected is not None
    assert fresh.selected is not None
    assert resumed.selected.best == fresh.selected.best
    if "size=1" not in then[0]:  # the larger ensemble before it has already trained more trials to the end
        assert resumed.selected == fresh.selected
    assert resumed.compared is not None


def test_search_without_a_checkpoint_never_reaches_the_ensemble(tmp_path: Path) -> None:
    def executor(spec: Spec, folder: Path) -> fakes.FakeExecutor:
        return fakes.FakeExecutor(diverge_above=0.0)

    launch = Launch(
        run_dir=tmp_path,
        spec=parse_spec(SPACE),
        folder=tmp_path,
        make_sampler=fakes.make_sampler,
        make_executor=executor,
        lock_wait_s=0,
    )
    with pytest.raises(NoUsableTrial):
        LocalFleet(launch).run(lambda entries: None)
    predictions = [path.name for path in (tmp_path / "predictions").iterdir()]
    assert all(name.startswith("baseline-") for name in predictions)


def test_stage_reads_its_predictions_from_the_run_directory(tmp_path: Path) -> None:
    state = whole(tmp_path)
    store = BlobStore(tmp_path)
    assert state.selected is not None
    for trial in state.selected.pool:
        result = state.results[f"evaluate/ensemble/{trial}"]
        assert store.arrays(str(result.values["predictions"]))["predictions"].shape == (fakes.N_ROWS, fakes.N_CLASSES)
    study = open_study(tmp_path, parse_spec(SPACE), make_sampler=fakes.make_sampler, background=False, wait_s=0)
    assert study.ended
    assert not any(isinstance(job, TrainJob) for job in study.pull("w").jobs)
    study.close()
