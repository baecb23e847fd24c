"""How much each index of an axis matters, over all the parameter slices that would go with it.

    l2(i)     = sqrt( sum over slices of ||w_i||^2 )                     (magnitude)
    taylor(i) = | sum over slices of <w_i, dL/dw_i> |                    (Molchanov et al. 2017, first order)

Scores are divided by their axis' mean, so that axes of different fan-in can be ranked together.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..passes.axes import Axis
from ..passes.typing import attribute
from .batches import LabelledData, call, device_of_model, in_order, placed, size_of
from .evaluate import logits_of

PerElement = Callable[[Tensor], Tensor]


def group_sums(gm: fx.GraphModule, axis: Axis, per_element: PerElement) -> Tensor:
    """Sum of `per_element(parameter)` over everything that belongs to each index of `axis`: shape (axis.size,)."""
    total = torch.zeros(axis.size, dtype=torch.float64)
    for piece in axis.slices:
        tensor = attribute(gm, piece.tensor)
        if isinstance(tensor, nn.Parameter):
            values = per_element(tensor).detach().double()
            others = [d for d in range(values.dim()) if d != piece.dim]
            along = values.sum(others) if others else values
            total += along.cpu()[piece.positions].sum(1)
    return total


def l2_scores(gm: fx.GraphModule, axes: Iterable[Axis]) -> dict[str, Tensor]:
    """L2 norm of each group, by axis name."""
    return {axis.name: group_sums(gm, axis, lambda w: w.square()).sqrt() for axis in axes}


def taylor_scores(
    gm: fx.GraphModule, axes: Iterable[Axis], data: LabelledData, batches: int = 8, batch_size: int = 64
) -> dict[str, Tensor]:
    """First-order estimate of how much the loss would change without each group, by axis name.

    Args:
        data: labelled samples (input, label); the loss is the mean cross-entropy of the first `batches` batches.
    """
    size_of(data, "importance")
    device = device_of_model(gm)
    with placed(gm, device):
        gm.eval().zero_grad()
        for _, (inputs, labels) in zip(range(batches), in_order(data, batch_size, device), strict=False):
            F.cross_entropy(logits_of(call(gm, inputs)), labels).backward()
        scores = {axis.name: group_sums(gm, axis, _weight_times_gradient).abs() for axis in axes}
        gm.zero_grad()
    return scores


def _weight_times_gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight * weight.grad


def normalised(scores: Tensor) -> Tensor:
    """Scores over their mean; all ones where every score is zero."""
    mean = scores.mean()
    return scores / mean if mean > 0 else torch.ones_like(scores)
