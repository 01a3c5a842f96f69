"""The chosen ensemble as a package: what the export job left in the run directory, put together with the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from hpsearch.archive import archive_of
from hpsearch.blobs import BlobStore
from hpsearch.job import Scalar
from hpsearch.package import Metrics, NewMember, write_package
from hpsearch.state import StudyState
from hpsearch.verdict import measured_metrics

FOLDER = "package"


def pack(run_dir: Path, state: StudyState, run_ids: Mapping[int, str] | None = None) -> Path | None:
    """The folder with the packaged ensemble, None when nothing was chosen or exported.

    Args:
        run_ids: each trial's run in MLflow, as far as there is one.

    Raises:
        PackageError: the folder cannot be written, or what was exported does not make a package.
        DamagedBlob: an exported file is gone, or not as it was written.
    """
    selected, data = state.selected, state.data
    if selected is None or data is None:
        return None
    exported = state.results.get("export/" + "+".join(str(trial) for trial, _ in selected.members))
    if exported is None or exported.outcome != "done":
        return None
    blobs = BlobStore(run_dir, archive_of(state))
    told = _mapping(exported.values["members"])
    members = []
    for trial, weight in selected.members:
        files = _mapping(told[str(trial)])
        onnx = files["onnx"]
        members.append(
            NewMember(
                trial=trial,
                weight=weight,
                config=state.trials[trial].config,
                onnx=None if onnx is None else blobs.read(str(onnx), state.digests.get(str(onnx), "")),
                weights=blobs.read(str(files["weights"]), state.digests.get(str(files["weights"]), "")),
                max_difference=_float(files.get("max_difference")),
                reason=str(files.get("reason") or ""),
                run_id=(run_ids or {}).get(trial),
            )
        )
    shape = exported.values["input_shape"]
    assert isinstance(shape, (list, tuple))
    test = measured_metrics(state, "test", selected.members)
    gain = state.compared.gain if state.compared is not None else {}
    folder = run_dir / FOLDER
    write_package(
        folder,
        study=state.name,
        outputs=data.outputs,
        n_classes=data.n_classes,
        input_shape=[int(n) for n in shape],
        input_dtype=str(exported.values["input_dtype"]),
        members=members,
        metrics=Metrics(val=measured_metrics(state, "val", selected.members), test=test or None, gain=_gain(gain)),
        test_fingerprint=data.test_fingerprint,
        created=datetime.fromtimestamp(state.last_at, UTC).isoformat(timespec="seconds"),
        hpsearch_version=metadata.version("hpsearch"),
    )
    return folder


def _gain(gain: Mapping[str, object]) -> dict[str, Scalar] | None:
    """The comparison with the best single trial, None where there was none."""
    return {k: v for k, v in gain.items() if v is None or isinstance(v, (bool, int, float, str))} or None


def _mapping(value: object) -> Mapping[str, object]:
    assert isinstance(value, Mapping)
    return value


def _float(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
