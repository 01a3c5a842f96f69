from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hpsearch.job import Config
from hpsearch.package import Metrics, NewMember, Package, write_package
from hpsearch.predict import check_graph, open_session, predict
from hpsearch.training import export
from hpsearch.training.export import TOLERANCE, export_members

ROWS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
SERIES = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(2))
TOKENS = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(3))


def seeded(model: nn.Module, seed: int) -> nn.Module:
    """The model with weights, and batch norm's statistics, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.2), nn.Flatten(), nn.Linear(144, 3)
    )


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.body = kind(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, series: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(series)[0][:, -1])
        return found


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, series: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(series).mean(1))
        return found


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 4, padding_idx=0)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.words(tokens).mean(1))
        return found


class Function(nn.Module):
    """A model whose forward is any function of itself and its input; it has one weight."""

    def __init__(self, function: Any, **attributes: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, inputs: Tensor) -> Any:
        return self.function(self, inputs)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """The models for which an export in full was asked."""
    asked: list[nn.Module] = []
    real = export._export

    def counting(model: nn.Module, example: Tensor) -> onnx.ModelProto:
        asked.append(model)
        return real(model, example)

    with monkeypatch.context() as patched:
        patched.setattr(export, "_export", counting)
        yield asked


def exported(*models: nn.Module, example: Tensor = ROWS) -> tuple[dict[str, Any], dict[str, bytes], dict[str, Any]]:
    values, blobs = export_members({i: (model, {"lr": 0.1}) for i, model in enumerate(models)}, example)
    members = values["members"]
    assert isinstance(members, dict)
    return values, blobs, members


def live(model: nn.Module, rows: Tensor) -> Any:
    was = model.training
    with torch.no_grad():
        outputs = model.eval()(rows).numpy()
    model.train(was)
    return outputs


def run(data: bytes, rows: Tensor) -> Any:
    return open_session(data, "the graph", threads=1).run(["outputs"], {"inputs": rows.numpy()})[0]


@pytest.mark.parametrize(
    ("make", "example"),
    [
        pytest.param(mlp, ROWS, id="mlp"),
        pytest.param(cnn, IMAGES, id="cnn with batch norm"),
        pytest.param(lambda: Recurrent(nn.GRU), SERIES, id="gru", marks=pytest.mark.slow),
        pytest.param(lambda: Recurrent(nn.LSTM), SERIES, id="lstm"),
        pytest.param(Transformer, SERIES, id="transformer", marks=pytest.mark.slow),
        pytest.param(Words, TOKENS, id="embedding"),
    ],
)
def test_members_of_one_architecture_are_exported_once_and_each_gives_what_its_model_gives(
    make: Any, example: Tensor, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    models = [seeded(make(), seed) for seed in (1, 2)]
    with counted(monkeypatch) as asked:
        values, blobs, members = exported(*models, example=example)
    assert asked == models[:1]
    assert values["input_shape"] == list(example.shape[1:])
    assert values["input_dtype"] == str(example.dtype).removeprefix("torch.")
    assert json.loads(json.dumps(values)) == values
    outputs = []
    for i, model in enumerate(models):
        assert members[str(i)]["reason"] == ""
        assert members[str(i)]["max_difference"] < 1e-5
        data = blobs[f"model/member-000{i}.onnx"]
        check_graph(data, "the graph")
        for n in (1, 2, 5):  # 2 and 5 were not compared when it was exported
            np.testing.assert_allclose(run(data, example[:n]), live(model, example[:n]), atol=1e-5)
        outputs.append(run(data, example))
    assert np.abs(outputs[0] - outputs[1]).max() > 0.1  # they are not one and the same
    assert capfd.readouterr() == ("", "")


def test_references_and_values_are_as_the_job_promises() -> None:
    values, blobs = export_members({4: (mlp(), {}), 17: (mlp(), {})}, ROWS)
    assert sorted(values) == ["input_dtype", "input_shape", "members"]
    assert isinstance(values["members"], dict)
    assert list(values["members"]) == ["4", "17"]
    member = values["members"]["17"]
    assert sorted(member) == ["max_difference", "onnx", "reason", "weights"]
    assert (member["onnx"], member["weights"]) == ("model/member-0017.onnx", "model/member-0017.safetensors")
    names = [f"model/member-{trial}" for trial in ("0004", "0017")]
    assert sorted(blobs) == [f"{name}.{kind}" for name in names for kind in ("onnx", "safetensors")]


def test_the_same_models_give_the_same_bytes() -> None:
    make = [seeded(cnn(), seed) for seed in (1, 2)]
    assert exported(*make, example=IMAGES)[1] == exported(*make, example=IMAGES)[1]


def test_weights_carry_trial_and_config_and_load_into_the_model() -> None:
    config: Config = {"lr": 0.1, "layers": [1, 2], "bias": None}
    model = seeded(cnn(), 1)
    _, blobs = export_members({17: (model, config)}, IMAGES)
    data = blobs["model/member-0017.safetensors"]
    other = cnn()
    other.load_state_dict(safetensors.torch.load(data))
    np.testing.assert_array_equal(live(other, IMAGES), live(model, IMAGES))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["hpsearch"]) == {"trial": 17, "config": config}


def test_tied_weights_are_exported_and_saved() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, rows: Tensor) -> Tensor:
            found: Tensor = self.second(self.first(rows).relu())
            return found

    models = [seeded(Tied(), seed) for seed in (1, 2)]
    _, blobs, members = exported(*models)
    assert [member["reason"] for member in members.values()] == ["", ""]
    assert len(safetensors.torch.load(blobs["model/member-0001.safetensors"])) == 4
    np.testing.assert_allclose(run(blobs["model/member-0001.onnx"], ROWS), live(models[1], ROWS), atol=1e-5)


def test_models_with_other_settings_and_equal_shapes_are_exported_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(slope: float) -> nn.Module:
        return seeded(nn.Sequential(nn.Linear(8, 3), nn.LeakyReLU(slope)), 1)

    models = [leaky(0.1), leaky(0.1 + 1e-6), leaky(0.1)]  # the comparison alone would let the second pass
    with counted(monkeypatch) as asked:
        exported(*models)
    assert asked == models[:2]


def test_a_copy_that_does_not_match_is_exported_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hidden setting, such as a tensor that is no buffer: the architectures look alike, the comparison tells."""

    def forward(self: Any, inputs: Tensor) -> Tensor:
        return inputs * self.weight * self._hidden

    models = [Function(forward, _hidden=torch.full((8,), value)) for value in (1.0, 2.0)]
    with counted(monkeypatch) as asked:
        _, blobs, members = exported(*models)
    assert asked == models
    assert [member["reason"] for member in members.values()] == ["", ""]
    np.testing.assert_allclose(run(blobs["model/member-0001.onnx"], ROWS), 2 * ROWS.numpy(), rtol=1e-6)


def test_a_graph_that_does_not_match_is_not_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = export._export

    def wrong(model: nn.Module, example: Tensor) -> onnx.ModelProto:
        graph = real(model, example)
        kernel = next(tensor for tensor in graph.graph.initializer if tensor.name == "3.bias")
        shifted = onnx.numpy_helper.to_array(kernel) + np.float32(0.25)
        kernel.CopyFrom(onnx.numpy_helper.from_array(shifted, kernel.name))
        return graph

    monkeypatch.setattr(export, "_export", wrong)
    model = seeded(mlp(), 1)
    _, blobs, members = exported(model)
    scale = np.abs(live(model, ROWS)).max()
    assert members["0"]["onnx"] is None
    assert members["0"]["max_difference"] == pytest.approx(0.25, rel=1e-4)
    assert members["0"]["reason"] == (
        f"the graph's outputs differ from the model's by 0.25, more than {TOLERANCE * scale:.2g}"
    )
    assert list(blobs) == ["model/member-0000.safetensors"]


def branching(self: Any, inputs: Tensor) -> Tensor:
    return inputs if inputs.sum() > 0 else -inputs


def test_a_model_that_cannot_be_exported_says_why_in_one_line_and_ships_its_weights(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    _, blobs, members = exported(Function(branching), seeded(mlp(), 1))
    reason = members["0"]["reason"]
    assert reason.startswith("torch.onnx: Could not guard on data-dependent expression")
    assert "(test_export.py:" in reason
    assert "\n" not in reason
    assert members["0"]["onnx"] is None
    assert members["0"]["max_difference"] is None
    assert members["1"]["onnx"] == "model/member-0001.onnx"  # one member's trouble is not the others'
    assert sorted(blobs) == [
        "model/member-0000.safetensors",
        "model/member-0001.onnx",
        "model/member-0001.safetensors",
    ]
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: x + torch.rand_like(x), "the model failed: its output changes from call to call, also after"),
        (lambda self, x: x / 0, "the model failed: its output is not finite on the example"),
        (lambda self, x: (x, x), "the model failed: its output is tuple, not one tensor"),
        (lambda self, x: x.sum(), "the model failed: its output has shape () for 1 rows"),
        (lambda self, x: x @ self.weight[:3], "the model failed: size mismatch, got input (1), mat (1x8), vec (3)"),
        (lambda self, x: (x * self.weight).bfloat16(), "the model failed: Got unsupported ScalarType BFloat16"),
        (lambda self, x: x.reshape(6, 8) if len(x) == 6 else x[:1].expand(len(x), 8), ""),
    ],
)
def test_a_model_that_gives_no_comparable_output_is_not_exported(forward: Any, reason: str) -> None:
    _, _, members = exported(Function(forward))
    assert members["0"]["onnx"] is None
    assert members["0"]["reason"].startswith(reason)
    assert members["0"]["reason"]


def test_what_was_borrowed_goes_back() -> None:
    model = seeded(cnn(), 1).train()
    model[3].eval()  # a layer frozen by the user
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    streams = sys.stdout, sys.stderr
    exported(model, Function(lambda self, x: x + torch.rand_like(x)), example=IMAGES)
    torch.testing.assert_close(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == [True, True, True, True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (sys.stdout, sys.stderr) == streams


def test_another_threads_words_pass_while_an_export_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with export._quiet():
        print("ours")
        speaker = threading.Thread(target=lambda: print("theirs"))
        speaker.start()
        speaker.join()
    assert capsys.readouterr().out == "theirs\n"


def test_graphs_hold_no_path_of_the_machine_they_were_made_on() -> None:
    _, blobs, _ = exported(seeded(Words(), 1), example=TOKENS)
    data = blobs["model/member-0000.onnx"]
    assert b"test_export" not in data
    assert b".py" not in data


ALOUD = """
import torch
from torch import nn
from hpsearch.training.export import export_members
class Branching(nn.Module):
    def forward(self, rows):
        return rows if rows.sum() > 0 else -rows
models = {0: (nn.Sequential(nn.Linear(8, 3)), {}), 1: (Branching(), {})}
values, _ = export_members(models, torch.randn(4, 8))
print([member["onnx"] for member in values["members"].values()])
"""


def test_a_process_that_exports_says_nothing_even_where_warnings_are_errors() -> None:
    """In a process of its own: pytest stands between torch's log handlers and the terminal."""
    root = str(Path(export.__file__).parents[2])
    command = [sys.executable, "-W", "error", "-c", ALOUD]
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("['model/member-0000.onnx', None]\n", "")


def test_an_example_of_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"two rows or more is needed \(got shape \(1, 8\)\)"):
        export_members({0: (mlp(), {})}, ROWS[:1])


# Exported, packed and predicted; and the same through MLflow


def packed(folder: Path) -> tuple[Package, list[nn.Module]]:
    models = [seeded(cnn(), seed) for seed in (1, 2)]
    values, blobs, _ = exported(*models, example=IMAGES)
    members = [
        NewMember(
            trial=trial,
            weight=weight,
            config={"lr": 0.1},
            onnx=blobs[f"model/member-000{trial}.onnx"],
            weights=blobs[f"model/member-000{trial}.safetensors"],
        )
        for trial, weight in ((0, 0.6), (1, 0.4))
    ]
    package = write_package(
        folder,
        study="images",
        outputs="logits",
        n_classes=3,
        input_shape=values["input_shape"],
        input_dtype=values["input_dtype"],
        members=members,
        metrics=Metrics(val={"loss": 0.1}),
        test_fingerprint="",
        created="2026-01-02T03:04:05+00:00",
        hpsearch_version="0.1.0",
    )
    return package, models


def test_an_exported_ensemble_predicts_what_its_models_predict(tmp_path: Path) -> None:
    package, models = packed(tmp_path / "ensemble")
    probs = [torch.softmax(torch.from_numpy(live(model, IMAGES)).double(), dim=1).numpy() for model in models]
    found = predict(package.folder, IMAGES.numpy())
    np.testing.assert_allclose(found, 0.6 * probs[0] + 0.4 * probs[1], atol=1e-6)


LOAD = """
import sys
import numpy as np
import mlflow.pyfunc
model = mlflow.pyfunc.load_model(sys.argv[1])
inputs = np.load(sys.argv[2])
np.save(sys.argv[3], model.predict(inputs))
inner = model.unwrap_python_model()
narrow = inner.predict(None, inputs)
import pandas
table = pandas.DataFrame(inputs.reshape(len(inputs), -1))
assert np.array_equal(inner.predict(None, inputs.astype("f8")), narrow)
assert np.array_equal(inner.predict(None, table), narrow)
assert np.array_equal(inner.predict(None, inputs.tolist()), narrow)
try:
    inner.predict(None, inputs[:, :, 1:])
except ValueError as error:
    assert str(error) == "inputs have shape (6, 1, 7, 8); (N, 1, 8, 8) is expected", error
else:
    raise AssertionError("a wrong shape was taken")
assert not {"hpsearch", "torch"} & set(sys.modules), "it does not stand alone"
"""


@pytest.mark.slow
def test_mlflow_loads_the_ensemble_without_hpsearch_and_without_pickle(tmp_path: Path) -> None:
    import mlflow.pyfunc
    from mlflow.models import infer_signature

    package, _ = packed(tmp_path / "ensemble")
    inputs = IMAGES.numpy()
    expected = predict(package.folder, inputs)
    mlflow.pyfunc.save_model(
        tmp_path / "model",
        python_model=str(Path(export.__file__).parents[1] / "pyfunc_model.py"),
        artifacts={"ensemble": str(package.folder)},
        signature=infer_signature(inputs, expected),
        input_example=inputs[:2],
        pip_requirements=["mlflow", "numpy", "onnxruntime"],
    )
    np.save(tmp_path / "in.npy", inputs)
    arguments = [str(tmp_path / name) for name in ("model", "in.npy", "out.npy")]
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-P", "-c", LOAD, *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-12)
