"""How strong the group lasso has to be: lambda as the training goes.

A step of learning rate lr takes lr * lambda off the root mean square r_g = ||w_g|| / sqrt|g| of every group that no
gradient holds up. So with a target, if the weakest groups whose removal meets it reach up to r, and the learning rates
of the steps up to a deadline sum to s, then

    lambda = r / s

takes them all to zero just in time; what gradients hold up makes the next lambda larger. The deadline lies before the
end, and s is at least a tenth of the sum over all sparsifying steps, and ten steps: what has not gone at the end is cut
rather than crushed together with all the rest.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..passes.axes import Axes
from ..passes.kinds import BRANCH
from .group_lasso import GroupLasso
from .ranking import Limits, dead_axes

_DEADLINE = 0.6  # of the sparsifying steps
_HORIZON, _STEPS = 0.1, 10


def horizon(lrs: Sequence[float], step: int) -> float:
    """The sum of the learning rates from `step` to the deadline; at least a tenth of all, and ten of the present."""
    present = lrs[min(step, len(lrs) - 1)]
    return max(sum(lrs[step : round(_DEADLINE * len(lrs))]), _HORIZON * sum(lrs), _STEPS * present)


def keep_without(axes: Axes, lasso: GroupLasso, zero: Tensor) -> dict[str, list[int]]:
    """Kept indices by axis name when the groups in `zero`, (groups,) bool, go; at least one index of every axis stays,
    and axes inside branches that go are not mentioned."""
    live = ~zero.cpu()
    kept = {name: live[at].nonzero()[:, 0].tolist() for name, at in lasso.groups.of_axis.items()}
    gone = [axes[name].atom for name, indices in kept.items() if axes[name].kind == BRANCH and not indices]
    dead = dead_axes(axes, gone)
    return {
        name: indices if indices or axes[name].kind == BRANCH else [0]
        for name, indices in kept.items()
        if len(indices) < axes[name].size and name not in dead
    }


def spared(axes: Axes, lasso: GroupLasso, norms: Tensor, limits: Limits, whole: dict[str, int]) -> Tensor:
    """(groups,) bool: the strongest indices of each axis, as many as its floor; `whole` are the first model's sizes."""
    result = torch.zeros_like(norms, dtype=torch.bool)
    for name, at in lasso.groups.of_axis.items():
        axis = axes[name]
        if axis.kind != BRANCH:
            least = min(axis.size, limits.least(whole.get(name, axis.size)))
            result[at.start + norms[at].topk(least).indices] = True
    return result


def weakest(rms: Tensor, candidates: Tensor, left: Callable[[Tensor], float], target: float) -> float:
    """The least r so that at most `target` is left without the `candidates` of root mean square r and below; infinite
    when all of them are not enough.

    Args:
        rms: (groups,). candidates: (groups,) bool, those that may go. left: of a mask of groups that go.
    """
    values = rms[candidates].unique()
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        enough = left(candidates & (rms <= values[middle])) <= target
        low, high = (low, middle) if enough else (middle + 1, high)
    return float(values[high]) if high < len(values) else float("inf")
