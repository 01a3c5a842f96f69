"""Data that the workers of a machine share: the same as if each had called data(), or not shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from hpsearch.errors import UserCodeError
from hpsearch.job import Config
from hpsearch.task import Splits, Task
from hpsearch.training import shared_data
from hpsearch.training.data import StudyData
from hpsearch.training.shared_data import LOCK, NOTE, why_not_shared
from hpsearch.training.splits import ReadSplits, read_splits

CPU = torch.device("cpu")
N_ROWS = 200
settings: dict[str, int] = {}  # a module's own state, which a data() may change


def rows(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N_ROWS, 8, generator=generator), torch.randint(0, 3, (N_ROWS,), generator=generator)


class Plain(Task):
    """Counts its calls beside itself, where nobody looks."""

    calls: Any = None

    def data(self) -> Splits:
        if self.calls is not None:
            self.calls()
        return Splits(train=rows(0), val=rows(1), test=rows(2))

    def model(self, config: Config) -> nn.Module:
        return nn.Linear(8, 3)


class Arrays(Plain):
    def data(self) -> Splits:
        super().data()
        return Splits(**{name: tuple(t.double().numpy() for t in rows(i)) for i, name in enumerate(("train", "val"))})


class OfDatasets(Plain):
    def data(self) -> Splits:
        super().data()
        return Splits(train=TensorDataset(*rows(0)), val=TensorDataset(*rows(1)))


class Items(Dataset[Any]):
    def __len__(self) -> int:
        return N_ROWS

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return torch.full((8,), float(row)), torch.tensor(row % 3)


class KeepsAMean(Plain):
    def data(self) -> Splits:
        splits = super().data()
        self.mean = splits.train[0].mean()
        return splits


class DropsANumber(Plain):
    def __init__(self) -> None:
        self.seed = 3

    def data(self) -> Splits:
        del self.seed
        return super().data()


class FillsAList(Plain):
    def __init__(self) -> None:
        self.names: list[str] = []

    def data(self) -> Splits:
        self.names.append("a class")
        return super().data()


class ChangesItsModule(Plain):
    def data(self) -> Splits:
        settings["n"] = settings.get("n", 0) + 1
        return super().data()


class ChangesItsClass(Plain):
    seen = 0

    def data(self) -> Splits:
        type(self).seen += 1
        return super().data()


class SetsTheEnvironment(Plain):
    def data(self) -> Splits:
        os.environ["HPSEARCH_TEST_DATA"] = str(os.urandom(4))
        return super().data()


class WritesIntoATensor(Plain):
    def __init__(self) -> None:
        self.scale = torch.ones(1)

    def data(self) -> Splits:
        self.scale.mul_(2)
        return super().data()


@pytest.fixture(autouse=True)
def worth_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These data are tiny."""
    monkeypatch.setattr(shared_data, "WORTH_BYTES", 1)
    monkeypatch.delenv("HPSEARCH_TEST_DATA", raising=False)
    yield
    os.environ.pop("HPSEARCH_TEST_DATA", None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry per call of data()."""
    made: list[None] = []
    monkeypatch.setattr(Plain, "calls", lambda self: made.append(None))
    return made


def load(task: Task, share: Path | None) -> StudyData:
    return StudyData.load(task, study_seed=0, cut_ensemble=True, device=CPU, share=share)


def batches(data: StudyData) -> list[Tensor]:
    found = []
    for split in data.info.n_rows:
        for pair in data.batches(split):  # type: ignore[arg-type]
            found += pair
    for pair in data.train_batches(batch_size=7, seed=3, epoch=2):
        found += pair
    return found


@pytest.mark.parametrize("task", [Plain, Arrays, OfDatasets])
def test_mapped_data_are_the_data_to_the_bit_and_data_is_called_once(
    task: type[Task], tmp_path: Path, calls: list[None]
) -> None:
    alone = load(task(), None)
    first, second = load(task(), tmp_path), load(task(), tmp_path)
    assert len(calls) == 2
    for shared in (first, second):
        assert shared.info == alone.info
        for ours, theirs in zip(batches(shared), batches(alone), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        assert type(shared.splits.train) is type(alone.splits.train)


def test_what_a_worker_writes_into_its_tensors_stays_its_own(tmp_path: Path) -> None:
    first, second = load(Plain(), tmp_path), load(Plain(), tmp_path)
    first.splits.train[0].zero_()
    assert torch.equal(second.splits.train[0], rows(0)[0])
    assert torch.equal(load(Plain(), tmp_path).splits.train[0], rows(0)[0])


def test_all_kinds_of_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    kinds = [torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.complex64]
    for number, kind in enumerate(kinds):

        class Kind(Plain):
            dtype = kind

            def data(self) -> Splits:
                x = torch.arange(N_ROWS * 6).reshape(N_ROWS, 2, 3).remainder(100).to(self.dtype)
                return Splits(train=(x, rows(0)[1]), val=(x, rows(0)[1]))

        folder = tmp_path / str(number)
        folder.mkdir()
        alone = load(Kind(), None)
        for _ in range(2):
            assert torch.equal(load(Kind(), folder).splits.train[0], alone.splits.train[0])
        assert json.loads((folder / NOTE).read_text())["why_not"] == ""


@pytest.mark.parametrize(
    "task",
    [KeepsAMean, DropsANumber, FillsAList, ChangesItsModule, ChangesItsClass, SetsTheEnvironment, WritesIntoATensor],
)
def test_data_that_does_more_than_return_is_called_by_every_worker(
    task: type[Task], tmp_path: Path, calls: list[None]
) -> None:
    load(task(), tmp_path)
    load(task(), tmp_path)
    assert len(calls) == 2
    assert json.loads((tmp_path / NOTE).read_text()) == {
        "why_not": "data() changes its task, its module or its process"
    }


class KeepsNumbers(Plain):
    def __init__(self, worker: int) -> None:
        self.worker = worker
        self.wide = 1

    def data(self) -> Splits:
        self.n_inputs, self.scale, self.wide = 6, 0.1 + 0.2, True
        return super().data()


def test_numbers_that_data_keeps_on_the_task_go_with_the_data(tmp_path: Path, calls: list[None]) -> None:
    for worker in range(2):
        task = KeepsNumbers(worker)
        load(task, tmp_path)
        assert vars(task) == {"worker": worker, "n_inputs": 6, "scale": 0.1 + 0.2, "wide": True}
        assert type(task.wide) is bool
    assert len(calls) == 1


class SetsWhatScikitLearnSets(Plain):
    def data(self) -> Splits:
        os.environ["KMP_INIT_AT_FORK"] = str(os.urandom(4))
        return super().data()


def test_what_scikit_learn_tells_openmp_is_no_trace(
    tmp_path: Path, calls: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMP_INIT_AT_FORK", "TRUE")
    load(SetsWhatScikitLearnSets(), tmp_path)
    load(SetsWhatScikitLearnSets(), tmp_path)
    assert len(calls) == 1


def test_attributes_that_data_leaves_alone_are_no_traces(tmp_path: Path, calls: list[None]) -> None:
    class Configured(Plain):
        def __init__(self) -> None:
            self.sizes = {"a": [1, 2]}
            self.table = np.arange(4)

    load(Configured(), tmp_path)
    load(Configured(), tmp_path)
    assert len(calls) == 1


def read(given: Splits) -> ReadSplits:
    return read_splits(Plain(), given)


def test_only_large_or_slow_contiguous_tensors_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_data, "WORTH_BYTES", 1 << 20)
    splits = read(Splits(train=rows(0), val=rows(1)))
    good: dict[str, Any] = {"seconds": 10.0, "left_traces": False, "free_bytes": 1 << 40}
    assert why_not_shared(splits, **good) == ""
    assert why_not_shared(splits, **{**good, "seconds": 0.1}) == "small, and quickly read"
    assert why_not_shared(splits, **{**good, "left_traces": True}).startswith("data() changes")
    assert why_not_shared(splits, **{**good, "free_bytes": 1000}) == "the disk is nearly full"
    turned = (rows(0)[0].t().contiguous().t(), rows(0)[1])
    assert why_not_shared(read(Splits(train=turned, val=rows(1))), **good) == "a tensor is not contiguous"
    assert why_not_shared(read(Splits(train=Items(), val=rows(1))), **good) == "a split is a Dataset"


def test_a_data_that_raises_raises_in_every_worker_with_its_frame(tmp_path: Path, calls: list[None]) -> None:
    class Missing(Plain):
        def data(self) -> Splits:
            super().data()
            raise FileNotFoundError("digits.csv")

    for _ in range(2):
        with pytest.raises(UserCodeError, match=r"FileNotFoundError: digits\.csv") as caught:
            load(Missing(), tmp_path)
        assert "test_shared_data.py" in caught.value.frame
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["cut", "longer", "gone", "note", "nonsense"])
def test_files_that_are_not_what_the_note_says_are_not_used(tmp_path: Path, calls: list[None], damage: str) -> None:
    load(Plain(), tmp_path)
    file = tmp_path / "train-x.bin"
    if damage in ("cut", "longer"):
        content = file.read_bytes()
        file.chmod(0o600)
        file.write_bytes(content[:-1] if damage == "cut" else content + b"0")
    elif damage == "gone":
        file.unlink()
    elif damage == "note":
        (tmp_path / NOTE).write_text("{")
    else:
        (tmp_path / NOTE).write_text('{"why_not": "", "splits": {"train": []}}')
    assert torch.equal(load(Plain(), tmp_path).splits.train[0], rows(0)[0])
    assert len(calls) == 2


def test_a_folder_that_cannot_be_written_leaves_every_worker_to_itself(tmp_path: Path, calls: list[None]) -> None:
    for _ in range(2):
        load(Plain(), tmp_path / "missing")
    assert len(calls) == 2


def test_workers_that_begin_at_once_wait_for_the_first(tmp_path: Path, calls: list[None]) -> None:
    found: list[StudyData] = []
    threads = [threading.Thread(target=lambda: found.append(load(Plain(), tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len({data.info.fingerprint for data in found}) == 1


def test_after_a_first_worker_that_was_killed_the_next_one_is_the_first(tmp_path: Path, calls: list[None]) -> None:
    """Its lock goes with it, and it has left no note."""
    program = (
        "import fcntl, os, signal, sys\n"
        "handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(handle, fcntl.LOCK_EX)\n"
        "open(sys.argv[2], 'wb').write(b'half')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / LOCK, tmp_path / "train-x.bin"], check=False, timeout=60)
    for _ in range(2):
        assert torch.equal(load(Plain(), tmp_path).splits.train[0], rows(0)[0])
    assert len(calls) == 1
