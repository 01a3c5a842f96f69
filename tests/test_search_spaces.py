"""The bundled studies: valid, with data that make sense, and networks for every config that a search can draw."""

from __future__ import annotations

import copy
import gzip
import os
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hpsearch
from hpsearch.spec import Spec, read_spec
from hpsearch.task import load_task

FOLDER = Path(__file__).resolve().parent.parent / "search_spaces"
SPACES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# One example of each study's input, and what the network gives for it.
SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype, int]] = {
    "diabetes": ((10,), torch.float32, 1),
    "digits": ((64,), torch.float32, 10),
    "letter": ((16,), torch.float32, 26),
    "mnist_cnn": ((28, 28), torch.uint8, 10),
    "own_loop": ((30,), torch.float32, 2),
}
# Data that the project does not ship: the variable that a task reads, and where they may lie beside the checkout.
NOT_SHIPPED = {"mnist_cnn": ("HPSEARCH_MNIST", "mnist.npz"), "letter": ("HPSEARCH_TABLES", "tables")}


@pytest.fixture(autouse=True)
def _tasks_leave_nothing_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other tests find sys.path and sys.modules as they were."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("hpsearch_task_"):
            del sys.modules[name]


def spec_of(name: str) -> Spec:
    return read_spec(FOLDER / f"{name}.yaml")


def task_of(name: str) -> hpsearch.Task:
    return load_task(spec_of(name).task, FOLDER)


def configs_of(name: str, n: int) -> Iterator[dict[str, Any]]:
    """Configs from uniform points, seeded: the same at every run of the test."""
    space = spec_of(name).space
    points_ND = np.random.default_rng(0).random((n, space.n_dims))
    return (space.config(point_D) for point_D in points_ND.tolist())


def test_five_studies_are_bundled() -> None:
    assert set(SPACES) == set(SHAPES)


@pytest.mark.parametrize("name", SPACES)
def test_study_is_valid_and_named_after_its_file(name: str) -> None:
    spec = spec_of(name)
    assert spec.name == name
    assert spec.metric.name in ("val_loss", "val_accuracy")


@pytest.mark.parametrize("name", SPACES)
def test_header_tells_what_hardware_how_and_what_came_out(name: str) -> None:
    header = (FOLDER / f"{name}.yaml").read_text().split("\nname:", 1)[0]
    assert re.findall(r"^# ([A-Z][a-z ]+):", header, flags=re.MULTILINE) == ["Searches", "Hardware", "Run", "Last run"]
    assert f"hpsearch launch search_spaces/{name}.yaml" in header
    last_run = header.split("# Last run:", 1)[1]
    assert re.search(r"20\d\d-\d\d-\d\d", last_run), "a header without a dated result is not finished"


@pytest.mark.parametrize("name", SPACES)
def test_network_takes_an_example_for_every_config_that_can_be_drawn(name: str) -> None:
    task = task_of(name)
    shape, dtype, n_outputs = SHAPES[name]
    for config in configs_of(name, 12):
        torch.manual_seed(0)
        output = task.model(config).eval()(torch.zeros((3, *shape), dtype=dtype))
        assert output.shape == (3, n_outputs)
        assert torch.isfinite(output).all()


@pytest.mark.parametrize("name", SPACES)
def test_data_are_finite_standardised_and_the_same_every_time(
    name: str, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in NOT_SHIPPED:
        variable, file = NOT_SHIPPED[name]
        place = Path(os.environ.get(variable, data_folder / file))
        if not place.exists():
            pytest.skip(f"its data are not shipped: {variable} is not set, and {place} is not there")
        monkeypatch.setenv(variable, str(place))
    splits, again = task_of(name).data(), task_of(name).data()
    shape, dtype, n_outputs = SHAPES[name]
    for part in ("train", "val", "test"):
        x, y = getattr(splits, part)
        assert x.shape[1:] == shape
        assert len(x) == len(y) >= 100  # below, no interval is given
        assert np.isfinite(x).all()
        assert all(np.array_equal(a, b) for a, b in zip((x, y), getattr(again, part), strict=True))
        if y.dtype.kind in "iu":
            assert set(np.unique(y)) == set(range(n_outputs))
        else:
            assert y.shape == (len(x), n_outputs)
    if dtype.is_floating_point:  # the others are standardised by the network
        x, _ = splits.train
        assert abs(x.mean()) < 1e-6
        assert x.std() == pytest.approx(1, abs=1e-6)


def small_mnist(path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 60), ("test", 10)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 10, n, dtype=np.uint8)
    np.savez(path, **arrays)


def test_mnist_sets_a_sixth_aside_and_can_train_on_fewer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_mnist(tmp_path / "mnist.npz")
    monkeypatch.setenv("HPSEARCH_MNIST", str(tmp_path / "mnist.npz"))
    task = task_of("mnist_cnn")
    splits = task.data()
    assert [len(splits.train[1]), len(splits.val[1]), len(splits.test[1])] == [50, 10, 10]
    monkeypatch.setenv("HPSEARCH_MNIST_TRAIN_ROWS", "20")
    fewer = task.data()
    assert np.array_equal(fewer.train[0], splits.train[0][:20])
    assert np.array_equal(fewer.val[0], splits.val[0])


def test_mnist_augmentation_moves_images_and_follows_its_generator() -> None:
    images = torch.zeros((2, 28, 28), dtype=torch.uint8)
    images[:, 14, 14] = 255
    task = task_of("mnist_cnn")
    moved = [task.augment(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1, 2, 3)]
    assert all(torch.equal(image.sum(), images.sum()) for image in moved)
    assert torch.equal(moved[0], moved[1])
    assert len({tuple(image.nonzero()[0].tolist()) for image in moved}) > 1


def test_letter_reads_a_packed_table_with_the_target_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lines = ["\t".join([*(f"x{i}" for i in range(16)), "target"])]
    for row in range(10_000):
        lines.append("\t".join(str(value) for value in [*rng.integers(0, 16, 16), 1 + row % 26]))
    with gzip.open(tmp_path / "letter.tsv.gz", "wt") as file:
        file.write("\n".join(lines))
    monkeypatch.setenv("HPSEARCH_TABLES", str(tmp_path))
    splits = task_of("letter").data()
    assert [len(part[1]) for part in (splits.train, splits.val, splits.test)] == [2_000, 4_000, 4_000]
    assert set(splits.train[1]) == set(range(26))


@pytest.mark.parametrize(("name", "variable"), [(name, variable) for name, (variable, _) in NOT_SHIPPED.items()])
@pytest.mark.parametrize("value", [None, "/nowhere/at/all"], ids=["unset", "wrong"])
def test_missing_data_are_named_with_the_variable_to_set(
    name: str, variable: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(variable, raising=False)
    if value is not None:
        monkeypatch.setenv(variable, value)
    with pytest.raises(FileNotFoundError, match=f"^{variable} must name .*{value or 'not set'}"):
        task_of(name).data()


def test_own_loop_goes_on_from_its_state_to_the_bit() -> None:
    task = task_of("own_loop")
    data = task.data()

    def tensors(part: tuple[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.as_tensor(part[0], dtype=torch.float32), torch.as_tensor(part[1])

    splits = hpsearch.Splits(train=tensors(data.train), val=tensors(data.val))
    config = next(configs_of("own_loop", 1)) | {"lr": 1e-3}

    def reports(epoch: int, state: dict[str, Any] | None, n: int) -> list[hpsearch.Report]:
        torch.manual_seed(0 if state is None else 99)  # a resumed network's first weights must not matter
        trial = hpsearch.Trial(epoch=epoch, state=state, number=0, seed=7, device=torch.device("cpu"))
        return list(islice(task.fit(task.model(config), config, splits, trial), n))

    whole = reports(0, None, 4)
    half = reports(0, None, 2)
    assert half[-1].state is not None
    rest = reports(2, copy.deepcopy(half[-1].state()), 2)
    assert [report.metrics for report in half + rest] == [report.metrics for report in whole]
    assert whole[-1].metrics["val_loss"] < whole[0].metrics["val_loss"] < np.log(2)
