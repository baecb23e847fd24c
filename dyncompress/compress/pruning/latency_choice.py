"""Kept indices for a share of the measured latency.

1. The ranking is cut where the predicted share meets the target.
2. Hardware works in steps: each kept size rises to the largest one that its calls do not take longer for.
3. The shrunk model is measured; where it is off by more than 5 %, the target is corrected and all starts again.
4. There are several rankings: all axes compete, and where branches may go they do so more or less eagerly; or every
   axis loses the same share and no branch goes. The one that keeps the most multiply-adds per millisecond is taken.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx

from ...errors import RequestError
from ...passes.axes.axes import Axes, Axis
from ...passes.axes.axis_kinds import BRANCH
from ...passes.dims.dims import Atom, Dim, Keep, leaves
from ...passes.dims.rule_registry import flat
from ...passes.shrink.shrink import shrink_axes
from ..options.limits import Limits
from .cost_left import share_left
from .latency import Latency
from .ranking import Ranking, candidates
from .removal_search import saved_by, search

_ERROR = 0.05
_CORRECTIONS = 3
_REFINEMENTS = 4  # each may have to be measured
_ROUNDS = 4  # steps that a kept size may rise by
_EAGER = (0.0, 1.0, 2.0)


@dataclass(frozen=True)
class LatencyChoice:
    """Kept indices with the predicted and the measured share of the full model's latency, and its milliseconds."""

    keep: Keep
    predicted: float
    measured: float
    whole_ms: float

    def misses(self, target: float) -> float:
        """By what share of the target the measured latency misses it."""
        return abs(self.measured / target - 1)


def choose_by_latency(
    axes: Axes,
    scores: Mapping[str, Tensor],
    target: float,
    limits: Limits,
    latency: Latency,
    *,
    scope: str | None = None,
    comparable: bool = False,
    whole: Mapping[str, int] | None = None,
    exact: bool = False,
) -> LatencyChoice:
    """A choice whose measured latency is near `target`, a share of the full model's; see `search.choose`.

    Args:
        scope: None = both "global" and "axis" are tried.

    Raises:
        RequestError: the target is out of reach.
    """
    macs = share_left(axes, "macs", [])
    found, failed = list[LatencyChoice](), None
    for tried, within, eager in _ways(axes, limits, scope):
        try:
            ranking = Ranking(
                axes, scores, within, saved_by(macs), scope=tried, eager=eager, comparable=comparable, whole=whole
            )  # fmt: skip
            found.append(_closest(ranking, target, latency, exact))
        except RequestError as error:
            failed = failed or error
    if not found:
        assert failed is not None
        raise failed
    near = [choice for choice in found if choice.misses(target) <= _ERROR]
    best = max(near, key=lambda c: macs(c.keep) / c.measured, default=None)
    return best or min(found, key=lambda c: c.misses(target))


def _ways(axes: Axes, limits: Limits, scope: str | None) -> Iterator[tuple[str, Limits, float]]:
    """Scopes, limits and eagerness of the rankings to try."""
    has_branches = any(axis.kind == BRANCH for axis in candidates(axes, limits))
    for eager in _EAGER if has_branches else (0.0,):
        yield scope or "global", limits, eager
    if scope is None:
        yield "axis", replace(limits, depth=False), 0.0


def _closest(ranking: Ranking, target: float, latency: Latency, exact: bool) -> LatencyChoice:
    axes, tried, goal = ranking.axes, list[LatencyChoice](), target
    touched = _touched(axes)
    for _ in range(1 + _CORRECTIONS):
        try:
            removed = search(ranking, latency.left, "latency", goal, _REFINEMENTS)
        except RequestError:
            if not tried:
                raise
            break  # the corrected target is out of reach: the closest so far stays
        keep = _raised(ranking, latency, ranking.counts(removed), touched)
        measured = latency.measured_left(shrink_axes(axes, keep, exact=exact))
        tried.append(LatencyChoice(keep, latency.left(keep), measured, latency.whole_ms))
        if tried[-1].misses(target) <= _ERROR:
            break
        goal = min(1.0, goal * target / measured)
    return min(tried, key=lambda choice: choice.misses(target))


def _raised(ranking: Ranking, latency: Latency, counts: dict[str, int], touched: dict[Atom, set[str]]) -> Keep:
    """Kept indices with each count as large as it can be at the same cost."""
    shrunk = [axis for axis in ranking.widths if counts.get(axis.name, axis.size) < axis.size]
    for group in _apart(shrunk, touched):
        rising = group
        for _ in range(_ROUNDS):
            higher = {axis.name: _next(ranking, axis, counts[axis.name]) for axis in rising if axis.name in counts}
            if not higher:
                break
            now, then = (latency.by_node(ranking.keep_counts(c)) for c in (counts, {**counts, **higher}))
            rising = [a for a in rising if _spent(then, touched[a.atom]) <= _spent(now, touched[a.atom])]
            counts = {**counts, **{axis.name: higher[axis.name] for axis in rising}}
            rising = [axis for axis in rising if counts[axis.name] < axis.size]
    return ranking.keep_counts(counts)


def _next(ranking: Ranking, axis: Axis, count: int) -> int:
    return next(n for n in ranking.allowed(axis) if n > count)


def _spent(by_node: Mapping[str, float], nodes: set[str]) -> float:
    return sum(ms for name, ms in by_node.items() if name in nodes)


def _apart(axes: list[Axis], touched: Mapping[Atom, set[str]]) -> list[list[Axis]]:
    """The axes in few groups, no two of one group in the same call, so that one measurement serves a whole group."""
    groups: list[tuple[list[Axis], set[str]]] = []
    for axis in axes:
        own = touched[axis.atom]
        free = next((group for group in groups if not group[1] & own), None)
        if free is None:
            groups.append(([axis], set(own)))
        else:
            free[0].append(axis)
            free[1].update(own)
    return [members for members, _ in groups]


def _touched(axes: Axes) -> dict[Atom, set[str]]:
    """Names of the calls in whose inputs, weights or outputs each axis occurs."""
    types, found = axes.types, dict[Atom, set[str]]()
    for node in types.gm.graph.nodes:
        for dim in _dims_around(axes, node):
            for atom in leaves(dim):
                found.setdefault(atom, set()).add(node.name)
    return found


def _dims_around(axes: Axes, node: fx.Node) -> Iterator[Dim]:
    types = axes.types
    for value in (node, *node.all_input_nodes):
        yield from flat(types.of(value))
    if node.op == "call_module":
        for name, _ in types.gm.get_submodule(str(node.target)).named_parameters():
            yield from types.params.get(f"{node.target}.{name}", ())
