"""Members as ONNX graphs and safetensors, each graph compared with the live model before it is shipped.

A graph is exported once per architecture; the next member of that architecture gets its own weights written into a
copy of it, which takes milliseconds where an export takes a second. What makes this safe is the comparison: every
member's graph is run on real rows beside the live model, and a copy that does not match is exported in full. A graph
that does not match even then is not shipped. Why ONNX: docs/decisions/0004.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import safetensors.torch
import torch
from torch import Tensor, nn

from hpsearch.job import Config
from hpsearch.package import MAX_GRAPH_BYTES, PackageError
from hpsearch.predict import INPUT, OUTPUT, check_graph, open_session

TOLERANCE = 1e-4
"""Greatest |graph - model|, relative to the largest |model| output. float32 gave at most 4e-7 (docs/decisions/0004)."""

TOLERANCE_HALF = 2e-2  # float16 has 11 bits: an operation alone errs by 5e-4, and a network has many

AnyArray = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """What came of exporting one model."""

    onnx: bytes | None
    max_difference: float | None  # greatest |graph - model|, in the outputs' unit; None when nothing was compared
    reason: str = ""  # one line; why onnx is None


def export_members(
    models: Mapping[int, tuple[nn.Module, Config]], example: Tensor
) -> tuple[dict[str, object], dict[str, bytes]]:
    """An export job's `values` and blobs, as job.Result describes them.

    Args:
        models: by trial: the model with its best checkpoint's weights, and its config. Weights, buffers, device,
            training mode and the random state are left as they were.
        example: (B, *input_shape), B >= 2: real inputs, since with one row the exporter would fix the batch size at 1,
            and with made-up ones the comparison would say little.

    Returns:
        values: {"members": {"17": {"onnx": ref | None, "weights": ref, "max_difference": float | None,
            "reason": str}}, "input_shape": […], "input_dtype": "float32"}.
        blobs: by reference, "model/member-0017.onnx" and "model/member-0017.safetensors".

    Raises:
        ValueError: the example has fewer than two rows.
    """
    if example.ndim < 1 or len(example) < 2:
        raise ValueError(f"an example of two rows or more is needed (got shape {tuple(example.shape)})")
    members: dict[str, object] = {}
    blobs: dict[str, bytes] = {}
    exporter = _Exporter(example.detach().cpu())
    for trial, (model, config) in sorted(models.items()):
        stem = f"model/member-{trial:04d}"
        blobs[f"{stem}.safetensors"] = weights_bytes(model, trial, config)
        graph = exporter.graph(model)
        if graph.onnx is not None:
            blobs[f"{stem}.onnx"] = graph.onnx
        members[str(trial)] = {
            "onnx": None if graph.onnx is None else f"{stem}.onnx",
            "weights": f"{stem}.safetensors",
            "max_difference": graph.max_difference,
            "reason": graph.reason,
        }
    dtype = str(example.dtype).removeprefix("torch.")
    return {"members": members, "input_shape": list(example.shape[1:]), "input_dtype": dtype}, blobs


def weights_bytes(model: nn.Module, trial: int, config: Config) -> bytes:
    """The model's state_dict as safetensors, with trial and config in its header.

    Tied tensors are written once each. What a state_dict holds besides tensors (`_extra_state`) is left out.
    """
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # a clone each: ties are refused
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    about = json.dumps({"trial": trial, "config": config}, sort_keys=True)
    return safetensors.torch.save(tensors, metadata={"hpsearch": about})


class _Exporter:
    """Makes one graph after another, and remembers one per architecture."""

    def __init__(self, example: Tensor) -> None:
        n = len(example)
        self._example = example
        # One row, the rows it is traced with, and a size seen neither in tracing nor in training.
        self._batches = [example[:1], example, example[torch.arange(2 * n + 1) % n]]
        self._templates: dict[str, onnx.ModelProto] = {}

    def graph(self, model: nn.Module) -> Graph:
        """The model as a graph that was seen to do what the model does, or the reason why there is none."""
        with _borrowed(model), _quiet():
            try:
                live = [_outputs(model, batch) for batch in self._batches]
            except Exception as error:  # the user's own forward
                return Graph(onnx=None, max_difference=None, reason=f"the model failed: {_one_line(error)}")
            architecture = _architecture(model)
            template = self._templates.get(architecture)
            swapped = None if template is None else _with_weights(template, model)
            if swapped is not None:
                copy = self._checked(swapped, live)
                if copy.onnx is not None:
                    return copy
            try:
                exported = _export(model, self._example)
            except Exception as error:  # the exporter raises whatever its passes and the user's forward raise
                return Graph(onnx=None, max_difference=None, reason=f"torch.onnx: {_one_line(error)}")
            graph = self._checked(exported, live)
            if graph.onnx is not None:
                self._templates.setdefault(architecture, exported)
            return graph

    def _checked(self, graph: onnx.ModelProto, live: Sequence[AnyArray]) -> Graph:
        """The graph's bytes, once onnxruntime has given for every batch what the model gave."""
        size = graph.ByteSize()
        if size > MAX_GRAPH_BYTES:
            reason = f"the graph takes {size / 2**30:.1f} GiB; ONNX holds 2 GiB in one file"
            return Graph(onnx=None, max_difference=None, reason=reason)
        data = graph.SerializeToString(deterministic=True)
        worst = 0.0
        scale = max(float(np.abs(expected).max(initial=0)) for expected in live)
        tolerance = (TOLERANCE_HALF if live[0].dtype == np.float16 else TOLERANCE) * (scale or 1.0)
        try:
            check_graph(data, "the graph")
            session = open_session(data, "the graph", threads=1)
            for batch, expected in zip(self._batches, live, strict=True):
                (found,) = session.run([OUTPUT], {INPUT: batch.numpy()})
                if found.shape != expected.shape or found.dtype != expected.dtype:
                    reason = f"the graph gives {found.dtype} {found.shape}, the model {expected.dtype} {expected.shape}"
                    return Graph(onnx=None, max_difference=None, reason=reason)
                # max() would pass over a NaN; np.max does not, and a NaN is no match.
                worst = float(np.max([worst, np.abs(found.astype(np.float64) - expected).max(initial=0)]))
        except PackageError as error:
            return Graph(onnx=None, max_difference=None, reason=error.message)
        except Exception as error:  # onnxruntime's errors share no base class
            return Graph(onnx=None, max_difference=None, reason=f"onnxruntime: {_one_line(error)}")
        if not worst <= tolerance:
            reason = f"the graph's outputs differ from the model's by {worst:.2g}, more than {tolerance:.2g}"
            return Graph(onnx=None, max_difference=worst if np.isfinite(worst) else None, reason=reason)
        return Graph(onnx=data, max_difference=worst)


def _outputs(model: nn.Module, batch: Tensor) -> AnyArray:
    """The live model's outputs, asked twice: a model that answers differently has no graph to compare with."""
    with torch.no_grad():
        first, second = model(batch), model(batch)
    if not isinstance(first, Tensor):
        raise TypeError(f"its output is {type(first).__name__}, not one tensor")
    if first.ndim == 0 or len(first) != len(batch):
        raise ValueError(f"its output has shape {tuple(first.shape)} for {len(batch)} rows")
    if not torch.isfinite(first).all():
        raise ValueError("its output is not finite on the example")
    if not torch.allclose(first, second, rtol=TOLERANCE, atol=TOLERANCE * float(first.abs().max())):
        raise ValueError("its output changes from call to call, also after eval()")
    outputs: AnyArray = first.numpy()
    return outputs


def _export(model: nn.Module, example: Tensor) -> onnx.ModelProto:
    """The model's graph with every weight under its own name, and without a trace of this machine's paths."""
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        verbose=False,
        external_data=False,
        # Optimizing folds weights into nameless constants (batch norm into convolutions, transposed matrices), so no
        # other member's could be written in. onnxruntime does the same when it loads the graph.
        optimize=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None  # dynamo=True
    graph: onnx.ModelProto = program.model_proto
    _strip(graph)
    return graph


def _strip(message: Any) -> None:
    """Drop what the exporter notes for debugging: stack traces with paths, class names, the code's own lines."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE and field.message_type.name != "TensorProto":
            for inner in value if isinstance(value, Sequence) or hasattr(value, "add") else [value]:
                _strip(inner)


def _with_weights(template: onnx.ModelProto, model: nn.Module) -> onnx.ModelProto | None:
    """A copy of the graph with this model's weights and buffers in it; None when they do not fit its shapes."""
    tensors = dict(_named_tensors(model))
    graph = onnx.ModelProto()
    graph.CopyFrom(template)
    for stored in graph.graph.initializer:
        if stored.name not in tensors:
            continue  # a constant of the architecture; were it not, the comparison would tell
        try:
            new = onnx.numpy_helper.from_array(tensors[stored.name].detach().numpy(), stored.name)
        except (TypeError, RuntimeError):  # a dtype that NumPy lacks, such as bfloat16; a sparse tensor
            return None
        if (new.data_type, list(new.dims)) != (stored.data_type, list(stored.dims)):
            return None
        stored.CopyFrom(new)
    return graph


def _architecture(model: nn.Module) -> str:
    """Equal for models that are likely to have the same graph: their modules, settings, and tensors' shapes.

    Only a guess that saves time; the comparison decides. The rate of a dropout is left out, since eval() turns it off.
    """
    modules = [
        f"{name}:{type(module).__module__}.{type(module).__qualname__}"
        f"({', '.join(f'{key}={_plain(value)}' for key, value in sorted(_settings(module).items()))})"
        for name, module in model.named_modules()
    ]
    tensors = [f"{name}:{tensor.dtype}{tuple(tensor.shape)}" for name, tensor in _named_tensors(model)]
    return "\n".join([*modules, *tensors])


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All weights and buffers, tied ones under each of their names, and the buffers that a state_dict leaves out."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _settings(module: nn.Module) -> dict[str, object]:
    dropout = ("p", "inplace") if isinstance(module, nn.modules.dropout._DropoutNd) else ()
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in ("training", *dropout)
    }


def _plain(value: object) -> str:
    if isinstance(value, bool | int | float | str | tuple | list | dict | type(None)):
        return repr(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))


# What is borrowed goes back

_ONE_AT_A_TIME = threading.Lock()  # streams, levels and warning filters belong to the process


@contextmanager
def _borrowed(model: nn.Module) -> Iterator[None]:
    """The model on the CPU in eval mode with the random state set aside; afterwards all is as it was."""
    training = {module: module.training for module in model.modules()}
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        try:
            model.to("cpu").eval()
            yield
        finally:
            model.to(device)
            for module, was in training.items():
                module.training = was


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stdout or stderr from this thread: no warnings, no logs, no half-traced graphs.

    A failed export is told by its reason; the exporter would also print pages of internals.
    """
    names = [name for name in logging.Logger.manager.loggerDict if name.split(".")[0] == "torch"]
    noisy: list[logging.Handler | logging.Logger] = [
        *(handler for name in names for handler in logging.getLogger(name).handlers),
        *map(logging.getLogger, ("onnxscript", "onnx_ir", "onnx")),
    ]
    with _ONE_AT_A_TIME, ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_muted())
        for source in noisy:
            stack.callback(source.setLevel, source.level)
            source.setLevel(logging.CRITICAL + 1)
        yield


@contextmanager
def _muted() -> Iterator[None]:
    """sys.stdout and sys.stderr drop what this thread writes; other threads' words pass."""
    out, err = sys.stdout, sys.stderr
    try:
        sys.stdout, sys.stderr = _DeafTo(out), _DeafTo(err)
        yield
    finally:
        sys.stdout, sys.stderr = out, err


class _DeafTo:
    """A stream that ignores the thread that made it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def _one_line(error: BaseException) -> str:
    """The first cause's first line, and the user's own line where the exporter names it."""
    frames = _FRAME.findall(str(error))
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines[0] if lines else type(error).__name__)[:200]
    return f"{text} ({PurePath(frames[-1][0]).name}:{frames[-1][1]})" if frames else text
