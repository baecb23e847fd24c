"""Surgery: a model gets smaller in the middle of its training, and what the optimiser knows of it goes along.

What is taken out is zeroed first, and norms keep their old counts (`shrink(exact=True)`), so that the small model
equals the large one with zeros; that is checked every time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ...errors import DynCompressError, RequestError
from ...passes.axes.axes import as_keep, infer_axes
from ...passes.shrink.plan import Plan, masked_copy, plan_axes
from ...passes.shrink.shrink import shrink_axes
from ...passes.shrink.verify import verify

KeepByName = Mapping[str, list[int]]


@dataclass(frozen=True)
class Surgery:
    """A smaller model, what it keeps, the plan that made it, and by how much its outputs differ from the zeroed model's
    (relative)."""

    model: fx.GraphModule
    keep: KeepByName
    plan: Plan
    difference: float


def operate(gm: fx.GraphModule, keep: KeepByName, *, check: bool = True) -> Surgery:
    """Takes out of a captured model all but `keep`, after zeroing it.

    check: compares both on random inputs.

    Raises:
        RequestError: unknown axes or indices; a statistic that cannot keep its count.
        DynCompressError: the models differ by more than float rounding: a defect.
    """
    axes = infer_axes(gm)
    zeroed = masked_copy(gm, plan_axes(axes, as_keep(axes, keep)))
    axes = infer_axes(zeroed)  # constants and counts are read off the zeroed model
    kept = as_keep(axes, keep)
    small = shrink_axes(axes, kept, exact=True)
    difference = _difference(zeroed, small, keep) if check else 0.0
    return Surgery(small, keep, plan_axes(axes, kept), difference)


def _difference(zeroed: fx.GraphModule, small: fx.GraphModule, keep: KeepByName) -> float:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = verify(zeroed, small, keep)
    if not found.ok:
        raise DynCompressError(f"the shrunk model does not equal the zeroed one: {found}")
    return found.error


def carry_over(optimizer: torch.optim.Optimizer, model: nn.Module, surgery: Surgery) -> None:
    """Puts the small model's parameters in the place of those of `model`, in every group of the optimiser, and slices
    all that it keeps for each number of a parameter: momentum, moments. Steps and learning rates stay.

    Raises:
        RequestError: the optimiser keeps something of another shape for a parameter that shrinks.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    small = dict(surgery.model.named_parameters())
    for group in optimizer.param_groups:
        before, group["params"] = group["params"], []
        for parameter in before:
            name, state = names[id(parameter)], optimizer.state.pop(parameter, None)
            if name in surgery.plan.dropped:
                continue
            group["params"].append(small[name])
            if state is not None:
                optimizer.state[small[name]] = {
                    key: _sliced(surgery.plan, name, parameter, value, key) for key, value in state.items()
                }


def _sliced(plan: Plan, name: str, parameter: Tensor, value: object, key: str) -> object:
    if not isinstance(value, Tensor) or value.dim() == 0 or name not in plan.kept:
        return value
    if value.shape != parameter.shape:
        raise RequestError(
            f"the optimiser keeps {key} of shape {tuple(value.shape)} for {name} of shape {tuple(parameter.shape)}: "
            "it cannot be sliced; use another optimiser"
        )
    return plan.slice(name, value)
