"""The ensemble as an MLflow pyfunc: this file is logged with the model, and MLflow runs it when the model is loaded.

It stands alone, so that a package loads where hpsearch is not installed: NumPy, onnxruntime and MLflow are all it
asks for. It is for those who trust their registry, since whoever can write there can change this file; `hpsearch pull`
takes the package beside it and never runs it.

    mlflow.pyfunc.save_model(path, python_model="…/pyfunc_model.py", artifacts={"ensemble": "…/the package's folder"})
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

FORMAT_VERSION = 1
BATCH_ROWS = 256
MAX_THREADS = 4


class Ensemble(PythonModel):
    """The weighted mean of the members: class probabilities, label probabilities, or values, as float64 (N, …)."""

    def load_context(self, context: Any) -> None:
        """Read ensemble.json and open every member's graph.

        Raises:
            RuntimeError: another format, a member without a graph, or a file that is not what ensemble.json says.
        """
        folder = Path(context.artifacts["ensemble"])
        about = json.loads((folder / "ensemble.json").read_text(encoding="utf-8"))
        if about["format_version"] != FORMAT_VERSION:
            raise RuntimeError(f"ensemble.json has format {about['format_version']}; this file reads {FORMAT_VERSION}")
        self.about = about
        self.members = [(member["weight"], _session(folder, member)) for member in about["members"]]

    def predict(
        self,
        context: Any,
        model_input: np.ndarray,  # MLflow warns about a wider hint, and about none
        params: dict[str, Any] | None = None,
    ) -> Any:
        """The prediction for each row.

        Args:
            context: MLflow's.
            model_input: an array (N, *input_shape), a DataFrame whose columns are one example's numbers in order, or
                nested lists; cast to the graphs' dtype.
            params: none are known.

        Raises:
            ValueError: the input has another shape, or is not numbers.
        """
        inputs = _as_inputs(model_input, tuple(self.about["input_shape"]), np.dtype(self.about["input_dtype"]))
        total = sum(weight for weight, _ in self.members)
        mean: Any = 0.0
        for weight, session in self.members:
            starts = range(0, max(1, len(inputs)), BATCH_ROWS)
            parts = [session.run(["outputs"], {"inputs": inputs[start : start + BATCH_ROWS]})[0] for start in starts]
            mean = mean + weight / total * _meaning(np.concatenate(parts), self.about["outputs"])
        return mean


def _session(folder: Path, member: dict[str, Any]) -> Any:
    """A member's graph, ready to run on the CPU."""
    packed = member["onnx"]
    if packed is None:
        raise RuntimeError(f"member {member['trial']} has no graph: {member['reason']}")
    if Path(packed["file"]).name != packed["file"]:
        raise RuntimeError(f"{packed['file']!r} is not a plain file name")
    data = (folder / packed["file"]).read_bytes()
    if hashlib.sha256(data).hexdigest() != packed["sha256"]:
        raise RuntimeError(f"{packed['file']} was altered: its sha256 is not what ensemble.json says")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    return onnxruntime.InferenceSession(data, sess_options=options, providers=["CPUExecutionProvider"])


def _as_inputs(found: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """The rows as one array. A table's row is one example laid out flat, so it is given its shape back."""
    is_table = hasattr(found, "to_numpy")
    array = np.asarray(found.to_numpy() if is_table else found)
    if is_table and array.ndim == 2 and array.shape[1] == int(np.prod(shape)):
        array = array.reshape(len(array), *shape)
    if array.ndim == 0 or array.shape[1:] != shape:
        expected = ", ".join(["N", *map(str, shape)])
        raise ValueError(f"inputs have shape {array.shape}; ({expected}) is expected")
    return np.ascontiguousarray(array.astype(dtype))


def _meaning(raw: Any, outputs: str) -> Any:
    """Outputs as what is averaged, float64: probabilities, or the values themselves."""
    raw = raw.astype(np.float64)
    if outputs == "values":
        return raw
    if outputs == "binary_logits":
        small = np.exp(-np.abs(raw))
        return np.where(raw >= 0, 1.0, small) / (1.0 + small)
    if outputs == "logits":
        exps = np.exp(raw - raw.max(axis=1, keepdims=True))
        return exps / exps.sum(axis=1, keepdims=True)
    raise RuntimeError(f"outputs of kind {outputs!r} are not known here")


set_model(Ensemble())
