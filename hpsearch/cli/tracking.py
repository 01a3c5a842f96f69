"""The logbook of one launch: MLflow told beside the search, the rest when it has ended."""

from __future__ import annotations

from pathlib import Path

from hpsearch.blobs import BlobStore
from hpsearch.cli.output import say
from hpsearch.errors import HpsearchError
from hpsearch.fleets import Launch
from hpsearch.packing import pack
from hpsearch.report.figures import Topic, figures
from hpsearch.state import StudyState
from hpsearch.tracker import JournalFollower, SyncReport, Tracker, TrackerThread

CLOSE_S = 600.0  # what a finished study gives MLflow to take the rest; an outage is noticed much sooner


def make_tracker(run_dir: Path, tracking_uri: str | None) -> Tracker:
    """The tracker of a run directory, with this project's figures and packages."""
    return Tracker(run_dir, tracking_uri=tracking_uri, plots=figures)


class Tracking:
    """Begin with `start`, end with `close`."""

    def __init__(self, run: Launch, tracking_uri: str | None) -> None:
        self._run_dir = run.run_dir
        self._thread = TrackerThread(
            make_tracker(run.run_dir, tracking_uri),
            JournalFollower(run.run_dir),
            warn=lambda text: say(f"warning[mlflow]: {text}"),
        )

    def start(self) -> None:
        """Tell MLflow from now on what the journal tells."""
        self._thread.start()

    def close(self, state: StudyState, timeout_s: float = CLOSE_S) -> SyncReport:
        """Keep the figures and the package in the run directory, and send the rest."""
        if state.opened is not None:
            self._keep(state)
        return self._thread.close(timeout_s)

    def _keep(self, state: StudyState) -> None:
        topics: tuple[Topic, ...] = ("lr-range", "search", "ensemble")
        plots = {f"plots/{name}": png for topic in topics for name, png in figures(topic, state).items()}
        try:
            for ref, png in plots.items():
                BlobStore(self._run_dir).keep({ref: png})
            if state.done:
                pack(self._run_dir, state)
        except HpsearchError as error:
            say(f"warning[run-dir]: {error}")
