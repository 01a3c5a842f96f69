"""The logbook of one launch: MLflow told beside the search, the rest when it has ended.

Figures and the packaged ensemble are kept in the run directory too, whether MLflow could be reached or not. Each is
made by the tracker's thread when MLflow wants it, else at the end.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path

from hpsearch.blobs import BlobStore
from hpsearch.cli.output import say
from hpsearch.errors import HpsearchError
from hpsearch.fleets import Launch
from hpsearch.packing import pack
from hpsearch.report.figures import Topic, drawn_from, figures, load_matplotlib
from hpsearch.state import StudyState
from hpsearch.tracker import JournalFollower, SyncReport, Tracker, TrackerThread

AFTER_S = 8.0  # from the first worker's arrival: MLflow and matplotlib take three seconds of a core to import
IMPORT_S = 30.0  # that it may take on a busy machine
CLOSE_S = 600.0  # what a finished study gives MLflow to take the rest; an outage is noticed much sooner
TOPICS: tuple[Topic, ...] = ("batch", "lr-range", "search", "ensemble")


class Keepsakes:
    """What a launch leaves in its run directory beside the journal: figures, and the ensemble as a package."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._drawn: dict[Topic, str] = {}  # topic -> what its figures were drawn from
        self._packed = False

    def draw(self, topic: Topic, state: StudyState) -> Mapping[str, bytes]:
        """The figures of a topic, as PNG bytes by file name; kept in `plots/`."""
        with contextlib.closing(BlobStore(self._run_dir)) as store:
            drawn = figures(topic, state, store.arrays)
            self._drawn[topic] = drawn_from(topic, state)
            store.keep({f"plots/{name}": png for name, png in drawn.items()})
        return drawn

    def pack(self, state: StudyState, run_ids: Mapping[int, str]) -> Path | None:
        """The packaged ensemble's folder, None when there is none."""
        self._packed = True
        return pack(self._run_dir, state, run_ids)

    def complete(self, state: StudyState) -> None:
        """Make what nobody has asked for yet, and draw again what has changed since it was drawn."""
        for topic in TOPICS:
            if drawn_from(topic, state) not in ("", self._drawn.get(topic)):
                self.try_to_draw(topic, state)
        try:
            if state.done and not self._packed:
                self.pack(state, {})
        except HpsearchError as error:
            say(f"warning[run-dir]: {error}")

    def try_to_draw(self, topic: Topic, state: StudyState) -> Mapping[str, bytes]:
        """As `draw`; a figure that cannot be made is told, and costs nothing else."""
        try:
            return self.draw(topic, state)
        except HpsearchError as error:
            say(f"warning[run-dir]: {error}")
        except Exception as error:
            say(f"warning[run-dir]: the {topic} figure could not be drawn: {type(error).__name__}: {error}")
        return {}


def make_tracker(run_dir: Path, tracking_uri: str | None, keepsakes: Keepsakes | None = None) -> Tracker:
    """The tracker of a run directory, with this project's figures and packages."""
    keepsakes = keepsakes or Keepsakes(run_dir)
    return Tracker(run_dir, tracking_uri=tracking_uri, plots=keepsakes.draw, package=keepsakes.pack)


class Tracking:
    """Begin with `start`, end with `close`."""

    def __init__(self, run: Launch, tracking_uri: str | None) -> None:
        self._keepsakes = Keepsakes(run.run_dir)
        self._timer: threading.Timer | None = None
        self._at_work = self._over = False
        self._lock = threading.Lock()
        self._thread = TrackerThread(
            make_tracker(run.run_dir, tracking_uri, self._keepsakes),
            JournalFollower(run.run_dir),
            warn=lambda text: say(f"warning[mlflow]: {text.removeprefix('MLflow: ')}"),
        )

    def start(self, after_s: float = AFTER_S) -> None:
        """Tell MLflow what the journal tells, from some seconds from now on. Only the first call of it counts."""
        if self._timer is None:
            self._timer = threading.Timer(after_s, self._go)
            self._timer.daemon = True
            self._timer.start()

    def _go(self) -> None:
        with self._lock:
            if not self._over:
                self._at_work = True
                self._thread.start()
                threading.Thread(target=load_matplotlib, daemon=True).start()

    def close(self, state: StudyState, timeout_s: float = CLOSE_S) -> SyncReport:
        """Send the rest, and keep the figures and the package in the run directory.

        A study that could not begin may owe MLflow something too, which then has to be imported first.
        """
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            self._over = True
        report = self._thread.close(timeout_s if self._at_work else max(timeout_s, IMPORT_S))
        if state.opened is not None:
            self._keepsakes.complete(state)
        return report
