"""How many units have to go: bisection over the ranking, then the most important come back where they still fit."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...errors import RequestError
from ...passes.axes.axes import Axes, Axis
from ...passes.axes.axis_kinds import BRANCH
from ...passes.dims.dims import Keep
from ..options.limits import Limits
from .cost_left import Left, share_left
from .ranking import Ranking, Unit, candidates

TOLERANCE = 0.02
_REFINEMENTS = 256


def choose(
    axes: Axes,
    scores: Mapping[str, Tensor],
    metric: str,
    target: float,
    limits: Limits,
    *,
    scope: str = "global",
    comparable: bool = False,
    whole: Mapping[str, int] | None = None,
) -> Keep:
    """Kept indices by atom: the least important go, until at most `target` of `metric` is left.

    The result is within 2 % of the whole model below the target wherever what can be removed is that fine.

    Args:
        scores: by axis name, shape (size,).
        metric: "ratio", "macs", "params" or "bytes".
        scope, comparable, whole: see `Ranking`.

    Raises:
        RequestError: the target cannot be met within the limits, an unknown scope or ignored name.
    """
    left = share_left(axes, metric, candidates(axes, limits))
    ranking = Ranking(axes, scores, limits, saved_by(left), scope=scope, comparable=comparable, whole=whole)
    return ranking.keep(search(ranking, left, metric, target))


def saved_by(left: Left) -> Callable[[Axis], float]:
    """What removing one branch alone saves, as a share of the whole."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return lambda branch: left({}) - left({branch.atom: nothing})


def search(ranking: Ranking, left: Left, metric: str, target: float, refinements: int = _REFINEMENTS) -> list[Unit]:
    """The units that have to go, so that at most `target` is left, and as little less as their sizes allow.

    Where one of them is too large a piece, `refinements` others at most are asked whether they fit instead.

    Raises:
        RequestError: the target cannot be met within the limits.
    """
    units, limits = ranking.units, ranking.limits
    low = sum(unit.forced for unit in units)
    least = left(ranking.keep(units))
    if least > target:
        multiples = limits.round_to if limits.round_to is not None else "8 or 16 where an axis is wide"
        raise RequestError(
            f"{metric}={target:.4g} is out of reach: with floor={limits.floor} and multiples of {multiples} at least "
            f"{least:.3f} stays; lower floor or round_to, or ignore less"
        )
    forced = left(ranking.keep(units[:low]))
    if low and forced < target - TOLERANCE:
        raise RequestError(
            f"{metric}={target:.4g} is out of reach: with ceiling={limits.ceiling} at most {forced:.3f} stays; raise it"
        )
    while True:
        removed = _prefix(ranking, units, low, left, target)
        last = removed[-1] if removed else None
        fits = left(ranking.keep(removed)) >= target * (1 - TOLERANCE)
        others = [unit for unit in units if unit is not last]
        if fits or last is None or last.axis.kind != BRANCH or left(ranking.keep(others)) > target:
            return _refined(ranking, removed, left, target, refinements)
        units = others  # that branch is too large a piece: channels go instead of it


def _prefix(ranking: Ranking, units: list[Unit], low: int, left: Left, target: float) -> list[Unit]:
    """The fewest first units, at least `low`, whose removal leaves at most `target`."""
    high = len(units)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if left(ranking.keep(units[:middle])) <= target else (middle + 1, high)
    return units[:high]


def _refined(ranking: Ranking, removed: list[Unit], left: Left, target: float, most: int) -> list[Unit]:
    """Where the last unit overshot (a head, a group), the most important of the others come back while they fit."""
    chosen = list(removed)
    whole = {removed[-1].axis.name} if removed else set()  # an axis gets its indices back in falling order only
    best = left(ranking.keep(chosen))
    for unit in removed[-2 : -most - 2 : -1]:
        if best >= target * (1 - TOLERANCE):
            break
        if unit.axis.name in whole or unit.forced:
            continue
        trial = [u for u in chosen if u is not unit]
        share = left(ranking.keep(trial))
        if best < share <= target:
            chosen, best = trial, share
        else:
            whole.add(unit.axis.name)
    return chosen
