"""Lanes: several trials of the default loop, trained as one program with `torch.func`.

Each lane is a `DefaultTraining`, made by the unfused code. Whether some trainings can share a program is asked in two
steps: `can_fuse` compares their structure, `find_route` a trial step of all of them with the unfused one. A `LaneGroup`
then trains them, an epoch at a time; `best_width` measures how many at once pay. Models that are only asked have no
training: `fused_outputs` compares what it gives with what each gives alone.
"""

from hpsearch.training.lanes.forward import Route
from hpsearch.training.lanes.lane_group import LaneGroup
from hpsearch.training.lanes.likeness import can_ask_together, can_fuse
from hpsearch.training.lanes.predictions import Predictor, fused_outputs
from hpsearch.training.lanes.ramps import fused_ramps
from hpsearch.training.lanes.refusal import LanesRefused
from hpsearch.training.lanes.trial_step import find_route
from hpsearch.training.lanes.width import Measurement, Width, best_width, choose_width, next_width

__all__ = [
    "LaneGroup",
    "LanesRefused",
    "Measurement",
    "Predictor",
    "Route",
    "Width",
    "best_width",
    "can_ask_together",
    "can_fuse",
    "choose_width",
    "find_route",
    "fused_outputs",
    "fused_ramps",
    "next_width",
]
