"""The logbook: what a study did, told to MLflow by one writer, at once or later.

`operations` computes what MLflow should hear from the study's state, `outbox` remembers what it has acknowledged,
`mlflow_writer` says it, and `tracker` brings the three together. `pull` goes the other way.
"""

from __future__ import annotations

from hpsearch.tracker.pull import PulledModel, pull
from hpsearch.tracker.tracker import JournalFollower, SyncReport, Tracker, TrackerThread

__all__ = ["JournalFollower", "PulledModel", "SyncReport", "Tracker", "TrackerThread", "pull"]
