"""Groups of weights for group lasso: which group each number of each parameter is in.

A *link* says it for one view of one parameter: along `dims` of the view lie the ids of the groups,

    axis index, filter   dims (0,)    ids (rows,)              channel   dims (1,)   ids (columns,)
    branch               dims ()      ids ()                   tile      dims (0, 1) ids (rows, columns)

and everything along the other dims belongs to the same group. Ids run over all groups of the model; the last, `count`,
is no group. A parameter has as many links as there are ways in which it is divided.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx, nn

from ...errors import RequestError
from ...passes.axes.axes import Axes, Axis
from ...passes.axes.axis_kinds import AXIS_KINDS, BRANCH
from ..importance.group_sums import parameter_slices

AXES, LAYERS = "axes", "layers"
REMOVABLE = (AXES, LAYERS, *AXIS_KINDS)
_OF_WEIGHTS = ("filters", "columns", "shapes", "tiles")


@dataclass(frozen=True, eq=False)
class Link:
    """The groups of `parameter`, seen in the shape `view`: `ids` lie along its `dims`."""

    parameter: str
    view: tuple[int, ...]
    dims: tuple[int, ...]
    ids: Tensor


@dataclass(frozen=True, eq=False)
class Groups:
    """All groups of one model: `count` of them, in `links`; those of each axis and branch lie at `of_axis[name]`, those
    of each kind that divides a weight at one of `of_weights`."""

    count: int
    links: tuple[Link, ...]
    of_axis: dict[str, slice]
    of_weights: tuple[slice, ...]


def check_kinds(kinds: Sequence[str]) -> None:
    """Raises RequestError for a kind of group that does not exist, or for none."""
    known = (*REMOVABLE, *_OF_WEIGHTS)
    for kind in kinds:
        if kind not in known:
            raise RequestError(f"unknown kind of group {kind!r}; choose from {', '.join(known)}")
    if not kinds:
        raise RequestError(f"kinds is empty; choose from {', '.join(known)}")


def chosen(axis: Axis, kinds: Iterable[str]) -> bool:
    """Whether the indices of an axis (or the branch that it is) are groups of one of these kinds."""
    return LAYERS in kinds if axis.kind == BRANCH else AXES in kinds or axis.kind in kinds


def find_groups(axes: Axes, kinds: Sequence[str], candidates: Iterable[Axis], tile: int) -> Groups:
    """The groups of these kinds; of `candidates`, the axes and branches that may go, and of all weights.

    Raises:
        RequestError: an unknown kind, or nothing in the model is of any of the kinds.
    """
    check_kinds(kinds)
    gm, count = axes.types.gm, 0
    links: list[Link] = []
    of_axis: dict[str, slice] = {}
    of_weights: list[slice] = []
    for axis in candidates:
        if chosen(axis, kinds):
            links += _axis_links(gm, axis, count)
            of_axis[axis.name] = slice(count, count + axis.size)
            count += axis.size
    for kind in _OF_WEIGHTS:
        for name, parameter in gm.named_parameters() if kind in kinds else ():
            if parameter.dim() > 1 and parameter.requires_grad:
                link, found = _weight_link(name, parameter, kind, count, tile)
                links.append(link)
                of_weights.append(slice(count, count + found))
                count += found
    if not count:
        raise RequestError(f"there is no group to sparsify: nothing in the model is one of {', '.join(kinds)}")
    device = next(gm.parameters()).device
    return Groups(count, tuple(_packed(links, count, device)), of_axis, tuple(of_weights))


def _axis_links(gm: fx.GraphModule, axis: Axis, first: int) -> Iterator[Link]:
    names = {id(parameter): name for name, parameter in gm.named_parameters()}
    for parameter, dim, positions in parameter_slices(gm, axis):
        name, shape = names[id(parameter)], tuple(parameter.shape)
        if axis.kind == BRANCH:
            yield Link(name, shape, (), torch.tensor(first))
            continue
        ids = torch.full((shape[dim],), -1)
        ids[positions] = torch.arange(first, first + axis.size)[:, None].expand_as(positions)
        yield Link(name, shape, (dim,), ids)


def _weight_link(name: str, parameter: nn.Parameter, kind: str, first: int, tile: int) -> tuple[Link, int]:
    shape = tuple(parameter.shape)
    matrix = (shape[0], prod(shape[1:]))
    if kind == "tiles":
        if tile < 1:
            raise RequestError(f"tile is the side of a tile, at least 1; got {tile}")
        across = -(-matrix[1] // tile)
        rows, columns = (torch.arange(size) // tile for size in matrix)
        return Link(name, matrix, (0, 1), first + rows[:, None] * across + columns), -(-matrix[0] // tile) * across
    view, dim = (matrix, 1) if kind == "shapes" else (shape, 0 if kind == "filters" else 1)
    return Link(name, view, (dim,), torch.arange(first, first + view[dim])), view[dim]


def _packed(links: Sequence[Link], count: int, device: torch.device) -> Iterator[Link]:
    """Links along the same dim of a parameter as one, where they do not overlap; -1 becomes `count`."""
    packed: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[Tensor]] = {}
    for link in links:
        layers = packed.setdefault((link.parameter, link.view, link.dims), [])
        for i, layer in enumerate(layers):
            if not ((layer >= 0) & (link.ids >= 0)).any():
                layers[i] = torch.maximum(layer, link.ids)
                break
        else:
            layers.append(link.ids)
    for (parameter, view, dims), layers in packed.items():
        for ids in layers:
            yield Link(parameter, view, dims, torch.where(ids < 0, count, ids).to(device))
