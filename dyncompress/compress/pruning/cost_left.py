"""What is left of a model for given kept indices: channels, MACs, parameters or bytes; its data is not touched."""

from collections.abc import Callable, Mapping

import torch
from torch import fx

from ...errors import RequestError
from ...passes.axes.axes import Axes, Axis, infer_axes
from ...passes.axes.axis_kinds import BRANCH
from ...passes.dims.dims import Keep
from ...passes.graph.copying import copy_with
from ...passes.graph.cost import count_bytes, count_macs, count_parameters
from ...passes.shrink.shrink import shrink_axes
from .ranking import dead_axes

Left = Callable[[Keep], float]  # the share that is left

COUNTS: dict[str, Callable[[fx.GraphModule], int]] = {
    "macs": count_macs,
    "params": count_parameters,
    "bytes": count_bytes,
}


def one_target(targets: Mapping[str, float | None]) -> tuple[str, float]:
    """The one metric that is given, and the share of it that stays.

    Raises:
        RequestError: none or several are given, or the share is not in (0, 1].
    """
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise RequestError(f"give exactly one of {', '.join(targets)}; got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if not 0 < value <= 1:
        raise RequestError(f"{name} is the share that stays, above 0 and at most 1; got {value}")
    return name, value


class Ghost:
    """A copy of a model that holds no data, to be shrunk and counted."""

    def __init__(self, axes: Axes) -> None:
        self.axes = infer_axes(_without_data(axes.types.gm))
        self._twins = {axis.atom: self.axes[axis.name].atom for axis in axes}

    def shrunk(self, keep: Keep) -> fx.GraphModule:
        """The copy with the kept indices of the original's axes, to be counted, not called."""
        return shrink_axes(self.axes, {self._twins[atom]: kept for atom, kept in keep.items()})


def share_left(axes: Axes, metric: str, candidates: list[Axis]) -> Left:
    """The share of `metric` - "ratio", "macs", "params" or "bytes" - that is left for given kept indices."""
    if metric == "ratio":
        return _ratio(axes, [axis for axis in candidates if axis.kind != BRANCH])
    ghost, count = Ghost(axes), COUNTS[metric]
    whole = max(count(axes.types.gm), 1)
    return lambda keep: count(ghost.shrunk(keep)) / whole


def _ratio(axes: Axes, widths: list[Axis]) -> Left:
    total = max(sum(axis.size for axis in widths), 1)

    def left(keep: Keep) -> float:
        dead = dead_axes(axes, [atom for atom in keep if atom in axes.branches])
        sizes = (len(keep[a.atom]) if a.atom in keep else a.size for a in widths if a.name not in dead)
        return sum(sizes) / total

    return left


def _without_data(gm: fx.GraphModule) -> fx.GraphModule:
    named = [*gm.named_parameters(), *gm.named_buffers()]
    return copy_with(gm, {name: torch.empty_like(tensor, device="meta") for name, tensor in named})
