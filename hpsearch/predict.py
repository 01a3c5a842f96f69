"""Predictions of a package: its graphs run by onnxruntime, and nothing else of it is run.

The graphs may come from a registry that others can write to. Before onnxruntime sees one, it is parsed and refused if
it points outside itself (tensors in other files) or asks for more than ONNX's own operators. It is then run from
memory, on the CPU. What this cannot prevent: a graph that asks for much time or memory gets them.

Legend: N examples, C classes (or values), M members.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hpsearch.errors import UsageError
from hpsearch.job import Outputs
from hpsearch.package import Package, PackageError, PackedMember, read_package

if TYPE_CHECKING:
    import onnx
    from onnxruntime import InferenceSession

FloatArray = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]

INPUT, OUTPUT = "inputs", "outputs"
"""The names of a graph's one input and one output; the first is also the key in INPUT.npz."""

PREDICTIONS = "predictions"
BATCH_ROWS = 256  # open: not yet measured with large models
MAX_THREADS = 4  # a prediction should not take the machine from those who train on it
STANDARD_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})


def predict_file(folder: Path, input_path: Path, output_path: Path) -> FloatArray:
    """The predictions for INPUT.npz's `inputs`, written to OUT.npz as `predictions`; OUT appears whole or not at all.

    Raises:
        UsageError: the input is not there, not an .npz, or does not fit the model; the output cannot be written.
        PackageError: the package cannot be used.
    """
    inputs = read_inputs(input_path)
    try:
        _require_writable(output_path, input_path)
        predictions = predict(folder, inputs)
        _write_npz(output_path, {PREDICTIONS: predictions})
    except OSError as error:
        raise UsageError(f"{output_path} cannot be written: {error.strerror or error}") from None
    return predictions


def predict(package_folder: Path, inputs: AnyArray) -> FloatArray:
    """The ensemble's prediction for each row.

    Args:
        package_folder: what `hpsearch pull` made.
        inputs: (N, *input_shape), prepared as they were for training, in the package's dtype, or in one that widens
            to it without changing a value within its kind (float32 to float64, int32 to int64). float64 is not
            narrowed and integers are not made floats: pixels of 0 to 255 are no pixels of 0 to 1, and only the caller
            knows which are meant.

    Returns:
        probs_NC for classes, each row summing to 1; (N, C) probabilities for independent labels; the values themselves
        for numbers. float64.

    Raises:
        UsageError: the inputs have another shape or dtype, no rows, or values that are not finite.
        PackageError: the package is damaged or refused, a member has no graph, or a graph fails.
    """
    package = read_package(Path(package_folder))
    checked = fitting_inputs(inputs, package)
    require_graphs(package)
    total = math.fsum(member.weight for member in package.members)  # 1 to within rounding
    mean: FloatArray | None = None
    for member in package.members:
        assert member.onnx is not None  # require_graphs
        data = package.read_file(member.onnx)
        check_graph(data, member.onnx.file)
        raw = _run(open_session(data, member.onnx.file), checked, member)
        part = member.weight / total * _meaning(raw, package, member)
        if mean is not None and mean.shape != part.shape:
            raise PackageError(f"member {member.trial} gives shape {part.shape}, the members before it {mean.shape}")
        mean = part if mean is None else mean + part
    assert mean is not None  # read_package refuses a package without members
    return mean


def require_graphs(package: Package) -> None:
    """Refuse a package of which some member is weights only.

    Raises:
        PackageError: names every such member and why it has no graph.
    """
    if missing := package.without_graph:
        reasons = "; ".join(f"member {member.trial}: {member.reason}" for member in missing)
        raise PackageError(
            f"{len(missing)} of {len(package.members)} members have no graph ({reasons})",
            hint="load their .safetensors into the task's own model",
        )


# Input and output


def read_inputs(path: Path) -> AnyArray:
    """The array `inputs` of an .npz file; nothing in it is unpickled.

    Raises:
        UsageError: says what the file is instead.
    """
    hint = f"np.savez({str(path.with_suffix('.npz'))!r}, {INPUT}=array) makes one"
    try:
        with path.open("rb") as file:
            return _inputs_of(file, path, hint)
    except FileNotFoundError:
        raise UsageError(f"{path} is not there") from None
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # NumPy, zipfile and zlib raise a dozen kinds for bytes that are no .npz
        if "allow_pickle" in str(error):
            raise UsageError(f"{path} holds pickled objects, which are never loaded", hint=hint) from None
        raise UsageError(f"{path} is not an .npz file, or a damaged one", hint=hint) from None


def _inputs_of(file: BinaryIO, path: Path, hint: str) -> AnyArray:
    magic = file.read(6)
    file.seek(0)
    if magic == b"\x93NUMPY":
        raise UsageError(f"{path} holds one bare array; an .npz with the key `{INPUT}` is expected", hint=hint)
    if magic[:2] != b"PK":  # NumPy would call anything else a pickle, also a table of numbers
        raise UsageError(f"{path} is not an .npz file", hint=hint)
    with np.load(file, allow_pickle=False) as arrays:
        if INPUT not in arrays.files:
            keys = ", ".join(arrays.files) or "nothing"
            raise UsageError(f"{path} has no `{INPUT}` (it holds {keys})", hint=hint)
        inputs: AnyArray = arrays[INPUT]
    if not isinstance(inputs, np.ndarray):  # an entry of the archive that is no array comes back as bytes
        raise UsageError(f"`{INPUT}` in {path} is not an array", hint=hint)
    return inputs


def fitting_inputs(inputs: AnyArray, package: Package) -> AnyArray:
    """The rows as the graphs take them: in the package's dtype, native byte order, contiguous.

    Raises:
        UsageError: expected and found, side by side.
    """
    inputs = np.asarray(inputs)
    wanted = np.dtype(package.input_dtype)
    shape = f"({', '.join(['N', *map(str, package.input_shape)])}{',' if not package.input_shape else ''})"
    if inputs.shape[1:] != package.input_shape or inputs.ndim == 0:
        hint = "one example needs a first dimension too: inputs[None]" if inputs.shape == package.input_shape else ""
        raise UsageError(f"`{INPUT}` has shape {inputs.shape}; the model takes {shape} of {wanted}", hint=hint)
    if inputs.dtype.kind != wanted.kind or not np.can_cast(inputs.dtype, wanted, "safe"):
        hint = f"prepare them as for training, then .astype({wanted.name!r})" if inputs.dtype.kind in "biuf" else ""
        raise UsageError(f"`{INPUT}` has dtype {inputs.dtype}; the model takes {shape} of {wanted}", hint=hint)
    if len(inputs) == 0:
        raise UsageError(f"`{INPUT}` has no rows")
    if wanted.kind == "f" and not (finite := np.isfinite(inputs)).all():
        rows = np.flatnonzero(~finite.reshape(len(inputs), -1).all(axis=1))
        raise UsageError(
            f"`{INPUT}` has NaN or infinity in {len(rows):,} of {len(inputs):,} rows (first in row {rows[0]})",
            hint="the model has never seen such a value, so what it makes of one means nothing",
        )
    return np.ascontiguousarray(inputs, dtype=wanted)


def _require_writable(path: Path, input_path: Path) -> None:
    """Refuse a bad OUT before the graphs are run, not after."""
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is not a folder; nothing can be written there")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file, such as {path / 'predictions.npz'}")
    if path.is_file() and path.samefile(input_path):
        raise UsageError(f"{path} is the input; predictions would overwrite it")


def _write_npz(path: Path, arrays: Mapping[str, AnyArray]) -> None:
    """Write beside, then replace."""
    beside = path.with_name(f".{os.getpid()}.new.npz")
    try:
        with beside.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# Graphs


def check_graph(data: bytes, name: str) -> onnx.ModelProto:
    """The parsed graph, known to stand on its own: one input, one output, standard operators, no other files.

    Args:
        data: the file's bytes.
        name: of the file, for messages.

    Raises:
        PackageError: what the graph asks for that it may not.
    """
    import onnx

    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:  # protobuf's DecodeError, whose module depends on the installed protobuf
        raise PackageError(f"{name} is not an ONNX graph") from None
    if not model.HasField("graph"):
        raise PackageError(f"{name} is not an ONNX graph")
    if model.functions or model.training_info:
        raise PackageError(f"{name} defines functions of its own; only ONNX's own operators are run")
    domains = {opset.domain for opset in model.opset_import}
    for graph in _graphs(model.graph):
        domains.update(node.domain for node in graph.node)
        for tensor in _tensors(graph):
            if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
                raise PackageError(f"{name} points to data outside itself; a graph must stand alone")
    if unknown := domains - STANDARD_DOMAINS:
        listed = ", ".join(sorted(map(ascii, unknown)))
        raise PackageError(f"{name} uses operators of {listed}; only ONNX's own are run")
    initialized = {tensor.name for tensor in model.graph.initializer}
    taken = [value.name for value in model.graph.input if value.name not in initialized]
    given = [value.name for value in model.graph.output]
    if (taken, given) != ([INPUT], [OUTPUT]):
        raise PackageError(f"{name} must take `{INPUT}` and give `{OUTPUT}` (found {taken} and {given})")
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and every graph inside it: the branches of an If, the body of a Loop or Scan."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that is stored in the graph itself, not in a graph inside it."""
    yield from graph.initializer
    sparse = [*graph.sparse_initializer]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("sparse_tensor"):
                sparse.append(attribute.sparse_tensor)
            sparse += attribute.sparse_tensors
    for pair in sparse:
        yield from (pair.values, pair.indices)


def open_session(data: bytes, name: str, *, threads: int | None = None) -> InferenceSession:
    """A graph ready to run on the CPU, from memory, without a word on stderr.

    Args:
        data: the bytes of a graph that `check_graph` let pass.
        name: of the file, for messages.
        threads: None: as many as there are cores, at most MAX_THREADS.

    Raises:
        PackageError: onnxruntime refuses the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # only what is fatal: everything else is raised as well
    options.intra_op_num_threads = threads or min(MAX_THREADS, os.cpu_count() or 1)
    options.inter_op_num_threads = 1
    # Bytes that parse as ONNX must not be taken for onnxruntime's own format, which was not checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        return onnxruntime.InferenceSession(data, sess_options=options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        raise PackageError(f"{name} cannot be run: {_first_line(error)}") from None


def _run(session: InferenceSession, inputs: AnyArray, member: PackedMember) -> AnyArray:
    """A member's raw outputs for all rows, a batch at a time, so memory does not grow with the input."""
    parts = []
    for start in range(0, len(inputs), BATCH_ROWS):
        batch = inputs[start : start + BATCH_ROWS]
        try:
            (part,) = session.run([OUTPUT], {INPUT: batch})
        except Exception as error:  # as in open_session
            raise PackageError(f"member {member.trial} cannot be run: {_first_line(error)}") from None
        if not isinstance(part, np.ndarray) or part.ndim == 0 or len(part) != len(batch):
            raise PackageError(f"member {member.trial} does not give one output per row")
        parts.append(part)
    return np.concatenate(parts)


def _meaning(raw: AnyArray, package: Package, member: PackedMember) -> FloatArray:
    """A member's outputs as what is averaged: probabilities, or the values themselves."""
    if raw.dtype.kind != "f" or not np.isfinite(raw).all():
        raise PackageError(f"member {member.trial} gives outputs that are not finite numbers")
    if package.outputs == "logits" and (raw.ndim < 2 or raw.shape[1] != package.n_classes):
        raise PackageError(f"member {member.trial} gives shape {raw.shape}; (N, {package.n_classes}) is expected")
    return MEANINGS[package.outputs](raw.astype(np.float64))


def softmax(logits_NC: FloatArray) -> FloatArray:
    """Class probabilities along the second dimension, as in torch's cross-entropy.

    >>> softmax(np.array([[1000.0, 1000.0]])).tolist()
    [[0.5, 0.5]]
    """
    exps = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    return np.asarray(exps / exps.sum(axis=1, keepdims=True), dtype=np.float64)


def sigmoid(logits: FloatArray) -> FloatArray:
    """The probability of yes; exp only ever sees what is not positive, so nothing overflows.

    >>> sigmoid(np.array([-1000.0, 0.0, 1000.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, small) / (1.0 + small)


def _identity(values: FloatArray) -> FloatArray:
    return values


MEANINGS: Mapping[Outputs, Callable[[FloatArray], FloatArray]] = {
    "logits": softmax,
    "binary_logits": sigmoid,
    "values": _identity,
}


def _first_line(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines() or [type(error).__name__]
    return ascii(lines[0][:200])[1:-1]
