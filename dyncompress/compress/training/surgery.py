"""Surgery: a model gets smaller in the middle of its training, and what the optimiser knows of it goes along.

What is taken out is zeroed first, and norms keep their old counts (`shrink(exact=True)`), so that the small model
equals the large one with zeros; that is checked every time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from ...errors import DynCompressError, RequestError
from ...passes.axes.axes import as_keep, infer_axes
from ...passes.shrink.plan import Plan, masked_copy, plan_axes
from ...passes.shrink.shrink import shrink_axes
from ...passes.shrink.verify import verify
from .schedule import Timetable

KeepByName = Mapping[str, list[int]]


@dataclass(frozen=True)
class Surgery:
    """A smaller model, the plan that made it, and by how much its outputs differ from the zeroed model's (relative)."""

    model: fx.GraphModule
    plan: Plan
    difference: float


class Surgeon(Protocol):
    """Acts after every step, and may replace the model by a smaller one after an epoch; saved and resumed with the run.

    request: what must be the same for a run to continue. progress: what the progress bar shows beside the loss.
    grow_batch: whether larger batches, and learning rates, take the memory that a smaller model frees.
    """

    request: Mapping[str, Any]
    progress: Mapping[str, str]
    grow_batch: bool

    def reschedule(self, timetable: Timetable) -> None:
        """What the steps are: before anything else, and again whenever those to come have changed."""

    def begin(self) -> None:
        """Before anything is trained or taken up, the model now on its device."""

    def after_step(self, step: int) -> None:
        """After the optimiser's step of this number, from 0."""

    def operate(self, epoch: int) -> Surgery | None:
        """After the epoch of this number, from 1; the model to go on with, if it changes."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Iterator[Surgery]:
        """Takes up a saved run: makes its surgeries again, whatever the weights, on the model that it began with."""


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
    return Surgery(small, plan_axes(axes, kept), difference)


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
