"""Shrink: slice every tensor by its dim types, then re-evaluate the sizes that modules and the graph spell out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..axes.axes import Axes, as_keep, infer_axes
from ..axes.branches import remove_branches
from ..dims.dims import Atom, new_size
from ..graph.graph_pass import GraphPass, PassResult
from .exact_counts import keep_counts
from .fold_constants import fold_constants
from .plan import masked_copy, plan_axes, sliced_copy
from .resize_modules import resize_modules
from .resize_ops import resize_ops

KeepByName = Mapping[str, Tensor | Sequence[int]]


def shrink(gm: fx.GraphModule, keep: KeepByName, *, exact: bool = False) -> fx.GraphModule:
    """A physically smaller copy of a captured model that keeps `keep[axis name]` of each named axis.

    An empty list for a branch (`"layer1.0:branch": []`) or a module (`"layer3": []`) removes that residual branch, or
    every one in the module.

    Where the removed indices contribute nothing it computes what `gm` computes. Norms and means over a shrunk axis
    divide by the new count; `exact=True` keeps the old one, as if what was removed were zero, and adds what removed
    indices without incoming weights leave behind, a constant, to the next bias (see `constants`).

    Raises:
        RequestError: unknown or frozen axis, an index out of range, or nothing kept.
    """
    axes = infer_axes(gm)
    return shrink_axes(axes, as_keep(axes, keep), exact=exact)


@dataclass(frozen=True)
class ShrunkAxes:
    """How many indices stay of each axis that shrank, by its name."""

    kept: Mapping[str, int]


@dataclass(frozen=True)
class Shrink(GraphPass[ShrunkAxes]):
    """`shrink` as a pass; `keep` holds the kept indices of each named axis."""

    name: ClassVar[str] = "shrink"
    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    exact: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", {name: tuple(map(int, kept)) for name, kept in self.keep.items()})

    def rewrite(self, gm: fx.GraphModule) -> PassResult[ShrunkAxes]:
        axes = infer_axes(gm)
        keep = as_keep(axes, self.keep)
        kept = {axis.name: len(keep[axis.atom]) for axis in axes if axis.atom in keep}
        return PassResult(shrink_axes(axes, keep, exact=self.exact), bool(keep), ShrunkAxes(kept))


def shrink_axes(axes: Axes, keep: Mapping[Atom, Tensor], *, exact: bool = False) -> fx.GraphModule:
    """`shrink` with axes already inferred and kept indices by atom."""
    types, scheme = axes.types, plan_axes(axes, keep)
    small = sliced_copy(types.gm, scheme)
    nodes = {node.name: node for node in small.graph.nodes}
    twins = [(old, nodes[old.name]) for old in types.gm.graph.nodes]
    resize_modules(types, small, keep)
    resize_ops(types, twins, keep)
    for old, new in twins:
        new.meta["val"] = _resized(old.meta.get("val"), types.dims.get(old, ()), keep)
    if exact:
        keep_counts(types, small, twins, scheme, keep)
        fold_constants(types, small, keep)
    remove_branches(small, [branch for atom, branch in axes.branches.items() if atom in keep])
    return small


def mask(gm: fx.GraphModule, keep: KeepByName) -> fx.GraphModule:
    """A copy of the same size with every removed slice zeroed: the reference that a shrunk model must equal."""
    axes = infer_axes(gm)
    return masked_copy(gm, plan_axes(axes, as_keep(axes, keep)))


def _resized(val: Any, dims: Any, keep: Mapping[Atom, Tensor]) -> Any:
    if isinstance(val, Tensor) and len(dims) == val.dim():
        shape = torch.Size([new_size(d, keep) for d in dims])
        return val if shape == val.shape else torch.empty(shape, dtype=val.dtype, device="meta")
    if isinstance(val, tuple | list) and len(dims) == len(val):
        return type(val)(_resized(v, d, keep) for v, d in zip(val, dims, strict=True))
    return val
