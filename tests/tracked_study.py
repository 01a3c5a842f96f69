"""Studies as their journals would tell them, made by hand: what the tracker and `pull` are tested with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpsearch.events import (
    Compared,
    DataSeen,
    Ended,
    Event,
    Finished,
    Leased,
    Opened,
    RangeMeasured,
    Selected,
    StageBegan,
    StageEnded,
    TrialDrawn,
)
from hpsearch.job import Config
from hpsearch.journal import Journal
from hpsearch.package import Metrics, NewMember, Package, write_package
from hpsearch.state import Entry, StudyState

START = 1_800_000_000.0
UID = "0123456789abcdef"


def spec(name: str = "digits", *, goal: str = "minimize", trials: int = 4, max_epochs: int = 3) -> dict[str, object]:
    """A spec's dump, with the keys that the tracker reads."""
    return {
        "name": name,
        "task": "digits_task.py:Digits",
        "metric": {"name": "val_loss" if goal == "minimize" else "val_accuracy", "goal": goal},
        "seed": 0,
        "search": {"method": "sobol", "trials": trials},
        "parameters": {"lr": {"distribution": "log_uniform", "min": 1e-5, "max": 1.0}, "width": {"values": [8, 16]}},
        "early_stopping": {"type": "asha", "min_epochs": 1, "max_epochs": max_epochs, "reduction_factor": 3},
        "mlflow": {"experiment": None, "registered_model": None, "alias": "champion"},
    }


class Script:
    """Events with times, one second apart unless told otherwise."""

    def __init__(self, name: str = "digits", *, uid: str = UID, **settings: object) -> None:
        self.events: list[tuple[float, Event]] = []
        self.now = START
        self.name = name
        self.uid = uid
        self.settings = settings
        self.resume()

    def resume(self, **settings: object) -> Script:
        self.settings |= settings
        dumped = spec(self.name, **self.settings)  # type: ignore[arg-type]
        environment = {"user": "ann", "git_commit": "abc123", "command": "hpsearch launch space.yaml", "torch": "2.13"}
        return self.add(
            Opened(study=self.name, uid=self.uid, spec=dumped, spec_text="name: digits\n", environment=environment)
        )

    def add(self, *events: Event) -> Script:
        for event in events:
            self.events.append((self.now, event))
            self.now += 1.0
        return self

    def data(self, *, test_fingerprint: str = "test-split-1") -> Script:
        rows = {"train": 100, "val": 30, "ensemble": 30} | ({"test": 40} if test_fingerprint else {})
        info = {
            "fingerprint": "data-1",
            "test_fingerprint": test_fingerprint,
            "n_rows": rows,
            "outputs": "logits",
            "n_classes": 3,
            "input_shape": [4],
            "input_dtype": "float32",
            "metrics": ["val_loss", "val_accuracy"],
        }
        return self.add(DataSeen(info=info))

    def lr_range(self) -> Script:
        self.add(StageBegan(stage="lr_range"))
        self.add(Finished(key="ramp/all/0", worker="w", outcome="done", values={"losses": [2.0, 1.0, 3.0]}))
        self.add(
            RangeMeasured(branch={}, lr=0.01, low=0.001, high=0.03, spread_decades=0.1, at_edge=False, confirmed=False)
        )
        return self.add(StageEnded(stage="lr_range"))

    def search_begins(self) -> Script:
        return self.add(StageBegan(stage="search"))

    def search_ends(self) -> Script:
        return self.add(StageEnded(stage="search"))

    def trial(
        self,
        number: int,
        losses: Sequence[float],
        *,
        config: Config | None = None,
        first: int = 1,
        outcome: str = "done",
    ) -> Script:
        """Train a trial for some epochs; from epoch `first` on when it was paused before."""
        if first == 1:
            drawn = config if config is not None else {"lr": 0.01 * (number + 1), "width": 8}
            self.add(TrialDrawn(trial=number, config=drawn, seed=number + 100))
        last = first + len(losses) - 1
        key = f"train/{number}/{first - 1}-{last}"
        self.add(Leased(key=key, worker="w", trial=number, from_epoch=first - 1, to_epoch=last))
        rows = tuple(
            (first + i, {"val_loss": loss, "val_accuracy": 1 - loss / 3, "train_loss": loss / 2}, 0.25)
            for i, loss in enumerate(losses)
        )
        ref = f"checkpoints/{number}-{last}"
        values = {"checkpoint": ref, "best_checkpoint": ref} if outcome == "done" else {}
        message = "" if outcome == "done" else f"trial {number} {outcome}"
        return self.add(
            Finished(
                key=key,
                worker="w",
                outcome=outcome,  # type: ignore[arg-type]
                trial=number,
                epochs=rows,
                values=values,
                message=message,
                frame="" if outcome == "done" else "task.py:7 in model",
            )
        )

    def crash(self, number: int) -> Script:
        """A trial's job ends by the user's own exception."""
        return self.add(
            Finished(key=f"train/{number}/0-1", worker="w", outcome="crashed", trial=number, message="KeyError: 'x'")
        )

    def ensemble(
        self,
        members: Sequence[tuple[int, float]] = ((0, 0.75), (1, 0.25)),
        *,
        n_trials: int = 4,
        best: int = 0,
        test_loss: float | None = 0.30,
    ) -> Script:
        from hpsearch.job import evaluation_key

        self.add(StageBegan(stage="ensemble"))
        self.add(
            Selected(
                n_trials=n_trials,
                best=best,
                pool=(0, 1),
                members=tuple(members),
                scores=(0.5, 0.4),
                single_score=0.5,
            )
        )
        measured = {"val": 0.35} | ({} if test_loss is None else {"test": test_loss})
        for split, loss in measured.items():
            for some in (list(members), [(best, 1.0)]):
                metrics = {"loss": loss + (0.02 if len(some) == 1 else 0.0), "accuracy": 0.9}
                key = evaluation_key(split, some)
                self.add(Finished(key=key, worker="w", outcome="done", values={"metrics": metrics, "n_rows": 40}))
        if test_loss is not None:
            gain = {"metric": "loss", "value": -0.02, "low": -0.03, "high": -0.01, "better": True}
            self.add(Compared(n_trials=n_trials, gain=gain))
        return self.add(StageEnded(stage="ensemble"))

    def ends(self, reason: str = "done") -> Script:
        return self.add(Ended(reason=reason))

    def state(self) -> StudyState:
        return StudyState.of(
            Entry(seq=i, fence=1, time=time, event=event) for i, (time, event) in enumerate(self.events)
        )

    def write(self, run_dir: Path) -> Path:
        """The study as a run directory."""
        times = iter([time for time, _ in self.events])
        journal = Journal.open(run_dir, clock=lambda: next(times))
        for _, event in self.events:
            journal.append(event)
        journal.close()
        return run_dir


def whole_study(name: str = "digits", **settings: object) -> Script:
    """Four trials: complete, stopped, diverged and failed; a range, an ensemble, an end."""
    script = Script(name, **settings).data().lr_range().search_begins()
    script.trial(0, [0.9, 0.6, 0.4]).trial(1, [1.0])
    script.trial(2, [float("nan")], outcome="diverged")
    script.trial(3, [], outcome="crashed").crash(3)
    return script.search_ends().ensemble().ends()


def small_package(folder: Path, *, members: Sequence[tuple[int, float]] = ((0, 0.75), (1, 0.25))) -> Package:
    """A package whose graphs are no graphs: enough for what does not run them."""
    return write_package(
        folder,
        study="digits",
        outputs="logits",
        n_classes=3,
        input_shape=(4,),
        input_dtype="float32",
        members=[
            NewMember(trial=t, weight=w, config={"lr": 0.1}, onnx=b"graph %d" % t, weights=b"weights %d" % t)
            for t, w in members
        ],
        metrics=Metrics(val={"loss": 0.35}, test={"loss": 0.30}),
        test_fingerprint="test-split-1",
        created="2027-01-15T08:00:00+00:00",
        hpsearch_version="0.1.0",
    )


def with_batch(digest: str = "0f") -> Script:
    """A whole study that kept a batch in preflight."""
    ref = "preflight/batch.safetensors"
    values = {"checks": [], "batch": ref, "kind": "rows"}
    return whole_study().add(
        Finished(key="check/batch/trial 0", worker="w", outcome="done", values=values, digests={ref: digest})
    )
