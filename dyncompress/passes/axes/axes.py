"""The axes of a captured model: which parameter slices must shrink together, and what cannot shrink and why."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from ...errors import RequestError
from ..dims.dims import Atom, Dim, coordinates, leaves
from ..dims.rule_registry import Typing
from ..dims.type_graph import type_graph
from ..graph.meta import is_captured
from ..graph.nodes import attribute
from .axis_kinds import BRANCH, kind_of
from .branches import Branch, find_branches


@dataclass(frozen=True)
class Slice:
    """Where one axis sits in one parameter or buffer: `positions[i]` (int64, shape (m,)) along `dim` are index i's.

    All of `dim`, of size `dim_type`, belongs to the one index of a branch.
    """

    tensor: str
    dim: int
    dim_type: Dim | int = field(repr=False)
    occurrence: int = field(default=0, repr=False)

    @property
    def positions(self) -> Tensor:
        """(axis size, m) int64."""
        if isinstance(self.dim_type, int):
            return torch.arange(self.dim_type)[None]
        return list(coordinates(self.dim_type))[self.occurrence][1]


@dataclass(frozen=True)
class Axis:
    """An atomic axis: `size` indices that shrink together in every slice of `slices`.

    `kind` says what its indices are: "channels", "heads", "hidden states" ... (see `kinds`); a "branch" is one index, a
    whole residual branch, and keeping none of it removes the branch. `prunable` is False when the axis cannot shrink,
    and `reason` says why. `statistics` names the nodes (norms, means) that average over it: there, shrinking changes
    the count, which `shrink(exact=True)` keeps.
    """

    name: str
    size: int
    prunable: bool
    reason: str | None
    slices: tuple[Slice, ...]
    statistics: tuple[str, ...] = ()
    kind: str = "features"
    atom: Atom = field(repr=False, compare=False, default_factory=lambda: Atom(0))


class Axes(Mapping[str, Axis]):
    """The axes of a graph by name, in order of first use; iterating gives the `Axis` objects."""

    def __init__(self, types: Typing, branches: list[Branch]) -> None:
        self.types = types
        self._axes = _collect(types, branches)
        self.branches: dict[Atom, Branch] = {}
        for branch in branches:
            axis = _branch_axis(types, branch)
            self._axes[axis.name] = axis
            self.branches[axis.atom] = branch

    def __getitem__(self, name: str) -> Axis:
        if name not in self._axes:
            raise RequestError(
                f"no axis named {name!r}; infer_axes lists them, e.g. {next(iter(self._axes), 'none')!r}"
            )
        return self._axes[name]

    def __iter__(self) -> Iterator[Axis]:  # type: ignore[override]
        return iter(self._axes.values())

    def __len__(self) -> int:
        return len(self._axes)

    def __contains__(self, name: object) -> bool:
        return name in self._axes

    @property
    def prunable(self) -> list[Axis]:
        """The axes that can shrink."""
        return [axis for axis in self if axis.prunable]

    @property
    def untyped(self) -> dict[str, str]:
        """Nodes that froze what they touch, with the reason."""
        return dict(self.types.untyped)


def infer_axes(gm: fx.GraphModule) -> Axes:
    """Every axis of the model's parameters, with its size, its parameter slices and, if it cannot shrink, why.

    An axis is named after the first parameter slice that holds it: `layer1.conv1.weight:0`, or `qkv.weight:0.1` for the
    second factor of a dim with several; a residual branch after the module that holds it: `layer1.0:branch`.

    Raises:
        RequestError: `gm` was not made by `capture`.
    """
    if not is_captured(gm):
        raise RequestError(f"expected a model from capture(), got {type(gm).__name__}")
    types = type_graph(gm)
    return Axes(types, find_branches(types))


def _branch_axis(types: Typing, branch: Branch) -> Axis:
    shapes = {name: attribute(types.gm, name).shape for name in branch.tensors}
    slices = tuple(Slice(name, 0, shape[0]) for name, shape in shapes.items() if shape)
    return Axis(branch.name, 1, True, None, slices, (), BRANCH, Atom(1))


def _collect(types: Typing, branches: list[Branch]) -> dict[str, Axis]:
    slices: dict[Atom, list[Slice]] = {}
    names: dict[Atom, str] = {}
    shrinks: set[Atom] = set()
    for tensor, dims in types.params.items():
        learned = isinstance(attribute(types.gm, tensor), nn.Parameter)
        for d, dim in enumerate(dims):
            atoms = list(leaves(dim))
            for at, atom in enumerate(atoms):
                slices.setdefault(atom, []).append(Slice(tensor, d, dim, at))
                if atom not in names or (learned and atom not in shrinks):  # a buffer only where there is no parameter
                    names[atom] = f"{tensor}:{d}" + (f".{at}" if len(atoms) > 1 else "")
                if learned:
                    shrinks.add(atom)
    statistics: dict[Atom, list[str]] = {}
    for statistic in types.statistics:
        for atom in leaves(statistic.dim):
            statistics.setdefault(atom, []).append(statistic.node)
    kinds = kind_of(types, branches)
    axes = {}
    for atom, found in slices.items():
        reason = atom.frozen or (None if atom in shrinks else "no learned parameter has it")
        name, stats = names[atom], tuple(statistics.get(atom, ()))
        axes[name] = Axis(
            name, atom.size, reason is None, reason, tuple(found), stats, kinds.get(atom, "features"), atom
        )
    return axes


def as_keep(axes: Axes, keep: Mapping[str, Tensor | Sequence[int]]) -> dict[Atom, Tensor]:
    """Checked, sorted kept indices by atom. Nothing of a branch may be kept; nothing of a module (`layer3`, say) means
    nothing of all branches in it.

    Raises:
        RequestError: unknown or frozen axis, an index out of range or repeated, or nothing kept.
    """
    result: dict[Atom, Tensor] = {}
    for name, indices in keep.items():
        if len(indices) == 0 and name not in axes:
            within = (f"{name}.", f"{name}:")
            inside = [atom for atom, branch in axes.branches.items() if branch.name.startswith(within)]
            if inside:
                result |= dict.fromkeys(inside, _NOTHING)
                continue
        axis = axes[name]
        kept = _checked(axis, indices)
        if len(kept) < axis.size:
            result[axis.atom] = kept
    return result


_NOTHING = torch.zeros(0, dtype=torch.int64)


def _checked(axis: Axis, indices: Tensor | Sequence[int]) -> Tensor:
    kept = torch.as_tensor(indices)
    if kept.numel() == 0 and axis.kind == BRANCH:
        return _NOTHING
    if kept.dim() != 1 or len(kept) == 0 or kept.is_floating_point() or kept.dtype == torch.bool:
        raise RequestError(f"keep[{axis.name!r}] must be a non-empty list of indices; at least one index has to stay")
    kept = kept.to("cpu", torch.int64).unique()
    if len(kept) != len(indices) or kept[0] < 0 or kept[-1] >= axis.size:
        raise RequestError(f"keep[{axis.name!r}] must hold distinct indices in 0..{axis.size - 1}")
    if len(kept) < axis.size and not axis.prunable:
        raise RequestError(f"axis {axis.name!r} cannot shrink: {axis.reason}")
    return kept
