"""Dropout masks of lanes: to the bit those that torch draws for the trial alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hpsearch.training.lanes import dropout
from hpsearch.training.lanes.dropout import Drawn, Masks, bernoulli_compares_shares

CPU = torch.device("cpu")
RATES = [[0.3, 0.5], [0.0, 0.9], [1.0, 0.1], [0.25, 0.0]]
SEEDS = [5, 6, 7, 8]


def alone(lane: int, calls: list[Tensor], n_steps: int) -> list[list[Tensor]]:
    """The masks of a lane's calls, step by step, by torch's own dropout of ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEEDS[lane])
        return [
            [functional.dropout(ones, RATES[lane][layer]) for layer, ones in enumerate(calls)] for _ in range(n_steps)
        ]


@pytest.mark.parametrize("by_shares", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masks_are_those_of_the_trial_alone(
    by_shares: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_shares and not bernoulli_compares_shares():
        pytest.skip("on this processor torch draws by MKL")
    monkeypatch.setattr(dropout, "bernoulli_compares_shares", lambda: by_shares)
    turned = torch.ones(3, 5, 4, dtype=dtype).permute(0, 2, 1)  # as channels_last: its memory is in another order
    calls = [torch.ones(6, 7, dtype=dtype), turned]
    plan = tuple(Drawn(layer, tuple(c.shape), c.stride(), dtype) for layer, c in enumerate(calls))
    masks = Masks(RATES, SEEDS, CPU)
    wanted = [alone(lane, calls, 3) for lane in range(len(RATES))]
    for step in range(3):
        drawn = masks.draw(plan, 3 - step)
        for lane in range(len(RATES)):
            for call, mask in enumerate(drawn):
                assert mask[lane].dtype == dtype
                assert torch.equal(mask[lane], wanted[lane][step][call]), (lane, step, call)


def test_another_plan_goes_on_where_the_generators_stand() -> None:
    large, small = torch.ones(8, 4), torch.ones(3, 4)
    masks = Masks([[0.5]], [5], CPU)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for ones in (large, small, large):
            (mask,) = masks.draw((Drawn(0, tuple(ones.shape), ones.stride(), ones.dtype),), 1)
            assert torch.equal(mask[0], functional.dropout(ones, 0.5))
