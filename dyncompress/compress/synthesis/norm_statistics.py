"""How far a batch is from the statistics that a network's batch norms remember, with a gradient to the batch.

    B = mean over channels of ((m - mu) / sigma)^2 + (d / sigma - 1)^2,     averaged over the batch norms

with mean m and deviation d of what the norm reads, and its running ones mu and sigma: in units of the deviation, so
that no channel counts more than another.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def mismatches(network: nn.Module) -> Iterator[list[Tensor]]:
    """A list that every call of the network inside adds the mismatch of each batch norm to, a scalar each."""
    found: list[Tensor] = []

    def note(norm: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(mismatch(norm, args[0]))

    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def mismatch(norm: nn.Module, x: Tensor) -> Tensor:
    """B of one batch norm that reads x (batch, channels, ...)."""
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    mean, square = _Moments.apply(x)
    sigma, deviation = ((v.clamp_min(0) + norm.eps).sqrt() for v in (norm.running_var, square - mean**2))
    return (((mean - norm.running_mean) / sigma).square() + (deviation / sigma - 1).square()).mean()


class _Moments(torch.autograd.Function):
    """The means (C,) of x (batch, C, ...) and of its square; autograd's own way takes two to three times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        dims = [d for d in range(x.dim()) if d != 1]
        wide = x.float()
        return wide.mean(dims), wide.square().mean(dims)

    @staticmethod
    def backward(ctx: Any, to_mean: Tensor, to_square: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        count, shape = x.numel() / x.shape[1], [-1] + [1] * (x.dim() - 2)
        offset, slope = ((g / count).to(x.dtype).view(shape) for g in (to_mean, 2 * to_square))
        return torch.addcmul(offset, slope, x)
