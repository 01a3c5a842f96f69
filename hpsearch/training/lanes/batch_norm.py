"""Batch norm of bfloat16 under `vmap`, which torch refuses: bfloat16 inputs beside float32 statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _LaneBatchNorm(_BatchNorm):
    """Computes in float32 and rounds at its end, as torch's own kernels for such inputs do without lanes."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float()).to(x.dtype)


class _LaneBatchNorm1d(_LaneBatchNorm, nn.BatchNorm1d): ...


class _LaneBatchNorm2d(_LaneBatchNorm, nn.BatchNorm2d): ...


class _LaneBatchNorm3d(_LaneBatchNorm, nn.BatchNorm3d): ...


_IN_LANES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _LaneBatchNorm1d,
    nn.BatchNorm2d: _LaneBatchNorm2d,
    nn.BatchNorm3d: _LaneBatchNorm3d,
}


def take_bf16(model: nn.Module) -> None:
    """Makes the batch norms of a model, which is one's own copy, into ones that take bfloat16 in lanes."""
    for module in model.modules():
        if type(module) in _IN_LANES:
            module.__class__ = _IN_LANES[type(module)]
