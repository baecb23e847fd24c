"""The order in which indices may go: least important first, within limits, and what is left after any number of them.

A *unit* is what goes at once: `round_to` indices of an axis, or a whole residual branch. Its score is the mean of its
indices', each divided by the mean of its axis. The units of one scope are sorted by score, and a unit's position is the
share of its scope that is gone once it is:

    global   one scope: everything competes            axis    every axis is a scope: all lose the same share
    block    the axes that begin between two neighbouring cut points are a scope: all blocks lose the same share

A branch competes by its worth per cost, d_b = s_b / c_b: its score s over the share c of the target (MACs, parameters)
that it saves. Mean and spread of d are made those of the scores u of all single indices,

    score(b) = mean u + ((d_b - mean d) / std d - e) * std u,

so that a branch that stands out among branches as a channel does among channels goes together with it, or, the more
eager e, before it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor, fx

from ...errors import RequestError
from ...passes.axes.axes import Axes, Axis
from ...passes.axes.axis_kinds import BRANCH
from ...passes.dims.dims import Atom, Keep
from ...passes.edit.analysis import Analysis
from ..importance.group_sums import normalised
from ..options.choices import Scope
from ..options.limits import Limits

_NOTHING = torch.zeros(0, dtype=torch.int64)


def candidates(axes: Axes, limits: Limits) -> list[Axis]:
    """The axes that may shrink.

    Raises:
        RequestError: `limits.ignore` names something that is not there.
    """
    for name in limits.ignore:
        if not any(_is_in(axis, name) for axis in axes):
            raise RequestError(f"ignore names {name!r}, but no parameter of the model is called that or lies below it")
    free = [axis for axis in axes.prunable if not any(_is_in(axis, name) for name in limits.ignore)]
    return [axis for axis in free if limits.depth or axis.kind != BRANCH]


def _is_in(axis: Axis, name: str) -> bool:
    """Whether this is the name of a tensor of the axis, or of a module that holds one."""
    return any(s.tensor == name or s.tensor.startswith(f"{name}.") for s in axis.slices)


@dataclass(frozen=True, eq=False)
class Unit:
    """What goes at once: it leaves `left` indices of its axis. `forced` by the ceiling, whatever the target."""

    score: float
    axis: Axis
    left: int
    forced: bool = False


class Ranking:
    """Every unit of a model in the order in which they go.

    Args:
        scores: by axis name, shape (size,); an axis without scores stays whole.
        branch_cost: the share of the target that removing one branch saves.
        comparable: the scores of different axes can be compared as they are.
        whole: the sizes by axis name that floor and ceiling are shares of, where the model is smaller already.
        eager: how many standard deviations earlier branches go.
    """

    def __init__(
        self,
        axes: Axes,
        scores: Mapping[str, Tensor],
        limits: Limits,
        branch_cost: Callable[[Axis], float],
        *,
        scope: str = "global",
        comparable: bool = False,
        whole: Mapping[str, int] | None = None,
        eager: float = 0.0,
    ) -> None:
        check_scope(scope)
        free = [axis for axis in candidates(axes, limits) if axis.name in scores]
        self.axes, self.limits, self.whole, self._eager = axes, limits, whole or {}, eager
        self.widths = [axis for axis in free if axis.kind != BRANCH]
        self._scores = {a.name: scores[a.name] if comparable else normalised(scores[a.name]) for a in self.widths}
        self._orders = {name: score.argsort(stable=True) for name, score in self._scores.items()}
        found = [unit for axis in self.widths for unit in self._units_of(axis)]
        found += self._branches([axis for axis in free if axis.kind == BRANCH], scores, branch_cost)
        self.units = _ordered(found, _scopes(axes, free, scope))

    def allowed(self, axis: Axis) -> list[int]:
        """The counts that an axis may have, ascending; the last is all of it."""
        size, whole = axis.size, self.whole.get(axis.name, axis.size)
        least = min(size, self.limits.least(whole))
        return sorted({self.limits.rounded(n, size) for n in range(least, size + 1)})

    def _units_of(self, axis: Axis) -> list[Unit]:
        order, score = self._orders[axis.name], self._scores[axis.name]
        most = self.limits.most(self.whole.get(axis.name, axis.size))
        steps = pairwise(reversed(self.allowed(axis)))
        return [
            Unit(float(score[order[axis.size - before : axis.size - after]].mean()), axis, after, before > most)
            for before, after in steps
        ]

    def _branches(
        self, branches: list[Axis], scores: Mapping[str, Tensor], cost: Callable[[Axis], float]
    ) -> list[Unit]:
        costs = {branch.name: cost(branch) for branch in branches}
        priced = [branch for branch in branches if costs[branch.name] > 0]  # the others save nothing
        if not priced:
            return []
        worth = torch.stack([scores[b.name].double().sum() / costs[b.name] for b in priced])
        others = torch.cat(list(self._scores.values())) if self._scores else worth
        spread = worth.std(correction=0)
        standard = (worth - worth.mean()) / (spread if spread > 0 else 1) - self._eager
        worth = standard * others.std(correction=0) + others.mean()
        return [Unit(float(score), branch, 0) for branch, score in zip(priced, worth, strict=True)]

    def keep(self, removed: Iterable[Unit]) -> Keep:
        """Kept indices by atom once these units are gone. Axes inside a branch that goes are not mentioned."""
        return self.keep_counts(self.counts(removed))

    def counts(self, removed: Iterable[Unit]) -> dict[str, int]:
        """How many indices stay of each axis that loses some."""
        counts: dict[str, int] = {}
        for unit in removed:
            counts[unit.axis.name] = min(unit.left, counts.get(unit.axis.name, unit.left))
        return counts

    def keep_counts(self, counts: Mapping[str, int]) -> Keep:
        """Kept indices by atom when each named axis keeps its best so many."""
        gone = [self.axes[name].atom for name, count in counts.items() if self.axes[name].kind == BRANCH and not count]
        dead = dead_axes(self.axes, gone)
        keep = dict.fromkeys(gone, _NOTHING)
        for name, count in counts.items():
            axis = self.axes[name]
            if axis.kind != BRANCH and name not in dead and count < axis.size:
                keep[axis.atom] = self._orders[name][axis.size - count :].sort().values
        return keep


def default_scope(depth: bool) -> str:
    """Equal shares (after fine-tuning more accurate), unless branches compete with channels."""
    return "global" if depth else "axis"


def check_scope(scope: str) -> None:
    """Raises RequestError for a scope that does not exist."""
    if scope not in get_args(Scope):
        raise RequestError(f"unknown scope {scope!r}; choose one of {', '.join(get_args(Scope))}")


def dead_axes(axes: Axes, gone: Iterable[Atom]) -> set[str]:
    """Names of the axes that live only inside branches that are gone."""
    tensors = {tensor for atom in gone for tensor in axes.branches[atom].tensors}
    if not tensors:
        return set()
    return {axis.name for axis in axes if axis.kind != BRANCH and tensors.issuperset(s.tensor for s in axis.slices)}


def _ordered(units: list[Unit], scope_of: Mapping[str, object]) -> list[Unit]:
    """By the share of their scope that is gone after each; what is forced comes first."""
    scopes: dict[object, list[Unit]] = {}
    for unit in sorted(units, key=lambda u: (not u.forced, u.score)):
        scopes.setdefault(scope_of[unit.axis.name], []).append(unit)
    placed = []
    for members in scopes.values():
        sizes = {u.axis.name: u.axis.size for u in members}
        left, total, gone = dict(sizes), sum(sizes.values()), 0
        for unit in members:
            gone += left[unit.axis.name] - unit.left
            left[unit.axis.name] = unit.left
            placed.append((not unit.forced, gone / total, unit))
    return [unit for _, _, unit in sorted(placed, key=lambda entry: entry[:2])]


def _scopes(axes: Axes, shrinkable: list[Axis], scope: str) -> dict[str, object]:
    """The scope of each axis, by name; all branches share one where every axis is its own."""
    if scope == "global":
        return dict.fromkeys((axis.name for axis in shrinkable), None)
    if scope == "axis":
        return {axis.name: BRANCH if axis.kind == BRANCH else axis.name for axis in shrinkable}
    users = _first_users(axes.types.gm)
    block_of = {node: i for i, block in enumerate(Analysis(axes.types).blocks) for node in block.nodes}
    return {axis.name: block_of.get(users.get(axis.slices[0].tensor)) for axis in shrinkable}  # type: ignore[arg-type]


def _first_users(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The first node that uses each parameter and buffer, by the tensor's name."""
    users: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            users.setdefault(str(node.target), node)
        elif node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            for name, _ in [*module.named_parameters(), *module.named_buffers()]:
                users.setdefault(f"{node.target}.{name}", node)
    return users
