from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from hpsearch.errors import HpsearchError, UsageError
from hpsearch.package import Metrics, NewMember, PackageError, write_package
from hpsearch.predict import BATCH_ROWS, check_graph, predict, predict_file, sigmoid, softmax

RNG = np.random.default_rng(0)
KERNELS = {trial: RNG.normal(size=(4, 3)).astype(np.float32) for trial in (1, 2)}
INPUTS = RNG.normal(size=(7, 4)).astype(np.float32)
IN_ROW_3 = np.arange(28).reshape(7, 4) == 13


def graph(
    *,
    kernel: Any = KERNELS[1],
    nodes: list[onnx.NodeProto] | None = None,
    initializers: list[TensorProto] | None = None,
    opsets: tuple[tuple[str, int], ...] = (("", 20),),
    input_name: str = "inputs",
    output_shape: tuple[Any, ...] = ("batch", 3),
) -> onnx.ModelProto:
    """outputs = inputs @ kernel, or whatever the nodes say."""
    made = helper.make_graph(
        nodes or [helper.make_node("MatMul", [input_name, "kernel"], ["outputs"])],
        "graph",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, list(output_shape))],
        initializers if initializers is not None else [numpy_helper.from_array(kernel, "kernel")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid(*opset) for opset in opsets], ir_version=10)


def package(folder: Path, graphs: dict[int, bytes | onnx.ModelProto | None], **changes: Any) -> Path:
    """A package of these graphs; the first weighs 0.75 where there are two."""
    weights = [1.0] if len(graphs) == 1 else [0.75, 0.25]
    members = [
        NewMember(
            trial=trial,
            weight=weight,
            config={},
            onnx=made.SerializeToString() if isinstance(made, onnx.ModelProto) else made,
            weights=b"weights",
            reason="" if made is not None else "it branches on its data",
        )
        for weight, (trial, made) in zip(weights, graphs.items(), strict=True)
    ]
    values: dict[str, Any] = {
        "study": "tiny",
        "outputs": "logits",
        "n_classes": 3,
        "input_shape": (4,),
        "input_dtype": "float32",
        "members": members,
        "metrics": Metrics(val={}),
        "test_fingerprint": "",
        "created": "2026-01-02T03:04:05+00:00",
        "hpsearch_version": "0.1.0",
    }
    write_package(folder / "ensemble", **{**values, **changes})
    return folder / "ensemble"


def pair(folder: Path, **changes: Any) -> Path:
    return package(folder, {trial: graph(kernel=kernel) for trial, kernel in KERNELS.items()}, **changes)


def refusal(folder: Path, made: bytes | onnx.ModelProto) -> str:
    with pytest.raises(PackageError) as caught:
        predict(package(folder, {17: made}), INPUTS)
    assert caught.value.message.isprintable()
    return caught.value.message


def test_probabilities_are_the_weighted_mean_of_the_members_softmax(tmp_path: Path) -> None:
    def probabilities(kernel: Any) -> Any:
        exps = np.exp((INPUTS @ kernel).astype(np.float64))
        return exps / exps.sum(axis=1, keepdims=True)

    found = predict(pair(tmp_path), INPUTS)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, 0.75 * probabilities(KERNELS[1]) + 0.25 * probabilities(KERNELS[2]), atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)


def test_values_are_averaged_as_they_are(tmp_path: Path) -> None:
    found = predict(pair(tmp_path, outputs="values", n_classes=None), INPUTS)
    np.testing.assert_allclose(found, INPUTS @ (0.75 * KERNELS[1] + 0.25 * KERNELS[2]), atol=1e-6)


def test_labels_are_averaged_as_probabilities_of_yes(tmp_path: Path) -> None:
    found = predict(package(tmp_path, {1: graph()}, outputs="binary_logits"), INPUTS)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-(INPUTS @ KERNELS[1]).astype(np.float64))), atol=1e-6)


def test_rows_are_predicted_alike_alone_and_in_many_batches(tmp_path: Path) -> None:
    folder = pair(tmp_path)
    rows = RNG.normal(size=(2 * BATCH_ROWS + 1, 4)).astype(np.float32)
    together = predict(folder, rows)
    assert together.shape == (2 * BATCH_ROWS + 1, 3)
    for row in (0, BATCH_ROWS - 1, BATCH_ROWS, 2 * BATCH_ROWS):
        np.testing.assert_allclose(predict(folder, rows[row : row + 1])[0], together[row], atol=1e-6)


@given(hnp.arrays(np.float64, (3, 4), elements=st.floats(-1e300, 1e300)))
def test_softmax_and_sigmoid_hold_for_any_finite_logits(logits: Any) -> None:
    with np.errstate(under="ignore"):
        probs = softmax(logits)
        yes = sigmoid(logits)
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-12)
    assert (probs >= 0).all()
    assert (yes >= 0).all()
    assert (yes <= 1).all()
    np.testing.assert_allclose(sigmoid(-logits), 1 - yes, atol=1e-12)


# INPUT.npz and OUT.npz


def test_file_in_gives_file_out(tmp_path: Path) -> None:
    folder = pair(tmp_path)
    np.savez(tmp_path / "in.npz", inputs=INPUTS, others=np.zeros(1))
    given_back = predict_file(folder, tmp_path / "in.npz", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["predictions"]
        np.testing.assert_array_equal(arrays["predictions"], given_back)
    np.testing.assert_allclose(given_back, predict(folder, INPUTS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ensemble", "in.npz", "out.npz"]
    predict_file(folder, tmp_path / "in.npz", tmp_path / "named otherwise")
    assert (tmp_path / "named otherwise").is_file()


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("exploded",))


HOSTILE_HEADER = (
    b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (10**15, 4), }".ljust(117)
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "in.npz is not an .npz file"),
        (b"inputs", "in.npz is not an .npz file"),
        (pickle.dumps(Bomb()), "in.npz is not an .npz file"),
        (npz(inputs=np.array([Bomb()], dtype=object)), "holds pickled objects, which are never loaded"),
        (npz(inputs=INPUTS)[:-30], "is not an .npz file, or a damaged one"),
        (npz(inputs=INPUTS).replace(b"NUMPY", b"NUMPX"), "is not an .npz file, or a damaged one"),
        (zipped(**{"inputs.npy": HOSTILE_HEADER + b"\n"}), "is not an .npz file, or a damaged one"),
        (zipped(inputs=b"text"), "`inputs` in in.npz is not an array"),
        (npy(INPUTS), "holds one bare array; an .npz with the key `inputs` is expected"),
        (npz(x=INPUTS, y=INPUTS), "has no `inputs` (it holds x, y)"),
        (npz(), "has no `inputs` (it holds nothing)"),
        (npz(inputs=INPUTS[:, :3]), "`inputs` has shape (7, 3); the model takes (N, 4) of float32"),
        (npz(inputs=INPUTS[0]), "`inputs` has shape (4,); the model takes (N, 4) of float32"),
        (npz(inputs=np.float32(1)), "`inputs` has shape (); the model takes (N, 4) of float32"),
        (npz(inputs=INPUTS[None]), "`inputs` has shape (1, 7, 4); the model takes (N, 4) of float32"),
        (npz(inputs=INPUTS.astype("f8")), "`inputs` has dtype float64; the model takes (N, 4) of float32"),
        (npz(inputs=INPUTS.astype("u1")), "`inputs` has dtype uint8; the model takes (N, 4) of float32"),
        (npz(inputs=INPUTS.astype("i8")), "`inputs` has dtype int64; the model takes (N, 4) of float32"),
        (npz(inputs=INPUTS.astype("U8")), "`inputs` has dtype <U8; the model takes (N, 4) of float32"),
        (npz(inputs=INPUTS.astype("c8")), "`inputs` has dtype complex64; the model takes (N, 4) of float32"),
        (npz(inputs=INPUTS[:0]), "`inputs` has no rows"),
        (npz(inputs=np.where(IN_ROW_3, np.nan, INPUTS)),
         "`inputs` has NaN or infinity in 1 of 7 rows (first in row 3)"),
        (npz(inputs=np.where(IN_ROW_3, np.inf, INPUTS)),
         "`inputs` has NaN or infinity in 1 of 7 rows (first in row 3)"),
    ],
)  # fmt: skip
def test_wrong_input_is_told_with_what_was_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    pair(tmp_path)
    Path("in.npz").write_bytes(data)
    with pytest.raises(UsageError) as caught:
        predict_file(Path("ensemble"), Path("in.npz"), Path("out.npz"))
    assert message in caught.value.message
    assert caught.value.exit_code == 2
    assert sorted(os.listdir()) == ["ensemble", "in.npz"]


def test_a_hint_tells_how_to_mend_the_input(tmp_path: Path) -> None:
    folder = pair(tmp_path)
    with pytest.raises(UsageError) as caught:
        predict(folder, INPUTS.astype(np.float64))
    assert caught.value.hint == "prepare them as for training, then .astype('float32')"
    with pytest.raises(UsageError) as caught:
        predict(folder, INPUTS[0])
    assert caught.value.hint == "one example needs a first dimension too: inputs[None]"


@pytest.mark.parametrize("dtype", [np.float16, np.dtype(">f4")])
def test_a_dtype_that_widens_without_changing_a_value_is_taken(tmp_path: Path, dtype: Any) -> None:
    rows = INPUTS.astype(np.float16).astype(dtype)
    folder = pair(tmp_path)
    np.testing.assert_array_equal(predict(folder, rows), predict(folder, rows.astype(np.float32)))


@pytest.mark.parametrize(
    ("name", "message"), [("missing.npz", "missing.npz is not there"), (".", "cannot be read: Is a directory")]
)
def test_an_input_that_is_no_file_is_told(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        predict_file(pair(tmp_path), tmp_path / name, tmp_path / "out.npz")


def test_an_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    folder = pair(tmp_path)
    np.savez(tmp_path / "in.npz", inputs=INPUTS)
    for output, message in [
        ("in.npz", "in.npz is the input; predictions would overwrite it"),
        ("nowhere/out.npz", "nowhere is not a folder"),
        ("ensemble", "ensemble is a folder; name a file"),
        ("x" * 300, "cannot be written: File name too long"),
    ]:
        with pytest.raises(UsageError, match=message):
            predict_file(folder, tmp_path / "in.npz", tmp_path / output)
    with np.load(tmp_path / "in.npz") as arrays:
        np.testing.assert_array_equal(arrays["inputs"], INPUTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ensemble", "in.npz"]


# Graphs that are refused


def test_a_pickle_named_onnx_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(tmp_path, pickle.dumps(Bomb())) == "member-0017.onnx is not an ONNX graph"
    assert not Path("exploded").exists()


@pytest.mark.parametrize("data", [b"\0", b"text", graph().SerializeToString()[:-7], b"\x08\x08" * 99, b"ORTM" * 99])
def test_bytes_that_are_no_graph_are_told(tmp_path: Path, data: bytes) -> None:
    assert refusal(tmp_path, data) == "member-0017.onnx is not an ONNX graph"


def external(location: str) -> TensorProto:
    tensor = TensorProto(name="kernel", data_type=TensorProto.FLOAT, dims=[4, 3])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def inside_an_if(tensor: TensorProto) -> onnx.ModelProto:
    """The tensor as a Constant of a branch, two graphs deep."""
    for _ in range(2):
        constant = helper.make_node("Constant", [], ["y"], value=tensor)
        branch = helper.make_graph([constant], "branch", [], [helper.make_tensor_value_info("y", 1, None)])
        node = helper.make_node("If", ["condition"], ["outputs"], then_branch=branch, else_branch=branch)
    return graph(nodes=[node], initializers=[])


@pytest.mark.parametrize("location", ["/etc/passwd", "../../../etc/passwd", "beside.bin", ""])
def test_a_graph_with_data_outside_itself_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "beside.bin").write_bytes(bytes(48))
    message = "member-0017.onnx points to data outside itself; a graph must stand alone"
    assert refusal(tmp_path, graph(initializers=[external(location)])) == message
    assert refusal(tmp_path, inside_an_if(external(location))) == message


def test_external_data_is_found_wherever_a_graph_can_hold_a_tensor() -> None:
    tensor = external("x")
    sparse = onnx.SparseTensorProto(values=numpy_helper.from_array(np.ones(1, "f4"), "v"), indices=tensor, dims=[4, 3])
    attributes = [
        helper.make_attribute("value", tensor),
        helper.make_attribute("values", [tensor]),
        helper.make_attribute("sparse_value", sparse),
        helper.make_attribute("sparse_values", [sparse]),
    ]
    models = [graph() for _ in attributes]
    for model, attribute in zip(models, attributes, strict=True):
        model.graph.node[0].attribute.append(attribute)
    models.append(graph())
    models[-1].graph.sparse_initializer.append(sparse)
    hidden = graph()  # the marks of external data, without the flag
    hidden.graph.initializer[0].external_data.add(key="location", value="x")
    for model in [*models, hidden]:
        with pytest.raises(PackageError, match="points to data outside itself"):
            check_graph(model.SerializeToString(), "x.onnx")


def test_operators_that_are_not_onnxs_own_are_refused(tmp_path: Path) -> None:
    evil = [helper.make_node("RunShell", ["inputs"], ["outputs"], domain="com.evil\x1b[2J")]
    message = "member-0017.onnx uses operators of 'com.evil\\x1b[2J'; only ONNX's own are run"
    assert refusal(tmp_path, graph(nodes=evil)) == message
    assert refusal(tmp_path, graph(opsets=(("", 20), ("com.microsoft", 1)))).startswith(
        "member-0017.onnx uses operators of 'com.microsoft'"
    )


def test_functions_of_its_own_are_refused(tmp_path: Path) -> None:
    model = graph()
    node = helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(helper.make_function("", "Mine", ["x"], ["y"], [node], [helper.make_opsetid("", 20)]))
    assert refusal(tmp_path, model) == (
        "member-0017.onnx defines functions of its own; only ONNX's own operators are run"
    )


def test_a_graph_with_other_inputs_is_refused(tmp_path: Path) -> None:
    message = "member-0017.onnx must take `inputs` and give `outputs` (found ['x'] and ['outputs'])"
    assert refusal(tmp_path, graph(input_name="x")) == message


def test_an_operator_that_does_not_exist_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = refusal(tmp_path, graph(nodes=[helper.make_node("NoSuchThing", ["inputs"], ["outputs"])]))
    assert message.startswith("member-0017.onnx cannot be run: ")
    assert capfd.readouterr() == ("", "")  # onnxruntime would write to stderr too


def test_a_graph_that_fails_or_gives_something_else_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert refusal(tmp_path, graph(kernel=np.full((4, 3), np.nan, np.float32))) == (
        "member 17 gives outputs that are not finite numbers"
    )
    assert refusal(tmp_path, graph(kernel=np.ones((4, 2), np.float32), output_shape=("batch", 2))) == (
        "member 17 gives shape (7, 2); (N, 3) is expected"
    )
    total = [helper.make_node("ReduceSum", ["inputs"], ["outputs"], keepdims=0)]
    assert refusal(tmp_path, graph(nodes=total, output_shape=())) == "member 17 does not give one output per row"
    fixed = [helper.make_node("Reshape", ["inputs", "shape"], ["outputs"])]
    shape = [numpy_helper.from_array(np.array([5, 5]), "shape")]
    assert refusal(tmp_path, graph(nodes=fixed, initializers=shape)).startswith("member 17 cannot be run: ")
    assert capfd.readouterr() == ("", "")


def test_a_member_without_a_graph_is_named_with_its_reason(tmp_path: Path) -> None:
    folder = package(tmp_path, {1: graph(), 2: None})
    with pytest.raises(PackageError) as caught:
        predict(folder, INPUTS)
    assert caught.value.message == "1 of 2 members have no graph (member 2: it branches on its data)"
    assert isinstance(caught.value, HpsearchError)


def test_members_whose_shapes_differ_are_refused(tmp_path: Path) -> None:
    narrow = graph(kernel=np.ones((4, 1), np.float32), output_shape=("batch", 1))
    folder = package(tmp_path, {1: graph(), 2: narrow}, outputs="values", n_classes=None)
    with pytest.raises(PackageError, match=r"member 2 gives shape \(7, 1\), the members before it \(7, 3\)"):
        predict(folder, INPUTS)


def test_predict_imports_neither_torch_nor_mlflow_and_the_module_not_even_onnxruntime(tmp_path: Path) -> None:
    folder = pair(tmp_path)
    script = (
        "import sys, pathlib, numpy as np\n"
        "from hpsearch.predict import predict\n"
        "print(sorted({'onnx', 'onnxruntime', 'torch', 'mlflow', 'ray', 'optuna', 'scipy'} & set(sys.modules)))\n"
        "predict(pathlib.Path(sys.argv[1]), np.zeros((2, 4), np.float32))\n"
        "print(sorted({'torch', 'mlflow', 'ray', 'optuna', 'scipy'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n[]\n", "", 0)
