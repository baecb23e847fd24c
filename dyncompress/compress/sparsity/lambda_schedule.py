"""How strong the group lasso has to be: lambda as the training goes.

A step of learning rate lr takes lr * lambda off the root mean square r_g = ||w_g|| / sqrt|g| of every group that no
gradient holds up. One lambda for all groups, small for a long time, is group lasso as published. A target and an end
leave less time: before small groups were zero, large ones would be crushed. So with a target lambda is adaptive: it is
zero for the groups that pruning would keep now, and for those of axis a that it would remove, up to r_a strong,

    lambda_a = r_a / s

with s the sum of the learning rates up to a deadline. That takes them to zero just in time. It is asked anew again and
again which ones they are, so that what gradients hold up may stay; the largest lambda_a never falls. The deadline lies
before the end, and s is at least a tenth of the sum over all sparsifying steps, and ten steps: what has not gone at the
end is cut.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...passes.axes.axes import Axes, Axis
from ...passes.axes.axis_kinds import BRANCH
from ...passes.dims.dims import Keep
from ..options.limits import Limits
from ..pruning.ranking import dead_axes
from .group_lasso import GroupLasso

DEADLINE = 0.6  # of the sparsifying epochs
_HORIZON, _STEPS = 0.1, 10


def horizon(lrs: Sequence[float], step: int, deadline: int) -> float:
    """The sum of the learning rates from `step` to the deadline; at least a tenth of all, and ten of the present."""
    present = lrs[min(step, len(lrs) - 1)]
    return max(sum(lrs[step:deadline]), _HORIZON * sum(lrs), _STEPS * present)


def keep_without(axes: Axes, lasso: GroupLasso, zero: Tensor, limits: Limits) -> dict[str, list[int]]:
    """Kept indices by axis name when the groups in `zero`, (groups,) bool, go, but for as many of them as make the
    count of an axis a multiple, and at least one index. Axes inside branches that go are not mentioned."""
    live = ~zero.cpu()
    kept = {name: _counted(axes[name], live[at], limits) for name, at in lasso.groups.of_axis.items()}
    gone = [axes[name].atom for name, indices in kept.items() if axes[name].kind == BRANCH and not indices]
    dead = dead_axes(axes, gone)
    return {name: indices for name, indices in kept.items() if len(indices) < axes[name].size and name not in dead}


def _counted(axis: Axis, live: Tensor, limits: Limits) -> list[int]:
    """The live indices of an axis, and the first others up to an allowed count."""
    count = int(live.sum())
    if axis.kind != BRANCH:
        count = limits.rounded(max(1, count), axis.size)
    first: list[int] = live.long().argsort(descending=True, stable=True)[:count].sort().values.tolist()
    return first


def spared(axes: Axes, lasso: GroupLasso, norms: Tensor, limits: Limits, whole: dict[str, int]) -> Tensor:
    """(groups,) bool: the strongest indices of each axis, as many as its floor; `whole` are the first model's sizes."""
    result = torch.zeros_like(norms, dtype=torch.bool)
    for name, at in lasso.groups.of_axis.items():
        axis = axes[name]
        if axis.kind != BRANCH:
            least = min(axis.size, limits.least(whole.get(name, axis.size)))
            result[at.start + norms[at].topk(least).indices] = True
    return result


def doomed(axes: Axes, lasso: GroupLasso, keep: Keep) -> Tensor:
    """(groups,) bool: what is not kept; `keep` are kept indices by atom."""
    result = torch.zeros(len(lasso), dtype=torch.bool)
    for name, at in lasso.groups.of_axis.items():
        kept = keep.get(axes[name].atom)
        if kept is not None:
            result[at] = True
            result[torch.arange(at.start, at.stop)[kept]] = False
    return result.to(lasso.sizes.device)


def pulls(lasso: GroupLasso, rms: Tensor, goes: Tensor, share: float) -> Tensor:
    """r_a of each group's axis where the group `goes`, 0 where it does not. Of the groups that divide a weight, and
    leave its shape, all but the strongest `share` go."""
    result = torch.zeros_like(rms)
    for at in lasso.groups.of_axis.values():
        if goes[at].any():
            result[at] = torch.where(goes[at], rms[at][goes[at]].max(), 0.0)
    for at in lasso.groups.of_weights:
        count = round((1 - share) * len(rms[at]))
        if count:
            level = rms[at].kthvalue(count).values
            result[at] = torch.where(rms[at] <= level, level, 0.0)
    return result
