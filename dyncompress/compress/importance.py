"""How much each index of an axis matters, over all the parameter slices that would go with it.

    l2(i)     = sqrt( sum over slices of ||w_i||^2 )                     (magnitude)
    taylor(i) = | sum over slices of <w_i, dL/dw_i> |                    (Molchanov et al. 2017, first order)

Scores are divided by their axis' mean, so that axes of different fan-in can be ranked together.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ..errors import RequestError
from ..passes.axes import Axis
from ..passes.capture import split_inputs
from ..passes.typing import attribute

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
    gm: fx.GraphModule, axes: Iterable[Axis], data: Dataset, batches: int = 8, batch_size: int = 64
) -> dict[str, Tensor]:
    """First-order estimate of how much the loss would change without each group, by axis name.

    Args:
        data: labelled samples (input, label); the loss is the mean cross-entropy of the first `batches` batches.
    """
    training = gm.training
    gm.eval().zero_grad()
    loader = DataLoader(data, batch_size)
    for _, (inputs, labels) in zip(range(batches), loader, strict=False):
        args, kwargs = split_inputs(inputs)
        F.cross_entropy(_logits(gm(*args, **kwargs)), labels).backward()
    scores = {axis.name: group_sums(gm, axis, _weight_times_gradient).abs() for axis in axes}
    gm.zero_grad()
    gm.train(training)
    return scores


def _weight_times_gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight * weight.grad


def _logits(output: Any) -> Tensor:
    found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.dim() != 2:
        raise RequestError("Taylor importance needs a model that returns (batch, classes) logits")
    return found


def normalised(scores: Tensor) -> Tensor:
    """Scores over their mean; all ones where every score is zero."""
    mean = scores.mean()
    return scores / mean if mean > 0 else torch.ones_like(scores)
