"""Which exits are worth having, once heads are trained at every candidate place.

An exit is kept when the best thresholds with it beat the best without it by a margin: a head that is too dear, or
answers too few, does not. Greedy: the exit that gains most is added until none gains enough, then each is left out
again that no longer does. An exit that is not kept costs nothing.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ...errors import RequestError
from ...passes.exits.keep_exits import KeepExits
from ...runtime.predict.dynamic import DynamicModel
from ...runtime.predict.policy import ExitPolicy
from ..thresholds.calibrate import calibrate_exits
from ..thresholds.call_costs import time_costs
from ..thresholds.candidates import Cached, collect_cached
from ..thresholds.goal import Goal
from ..thresholds.thresholds import OperatingPoint, ThresholdSearch
from ..training.batches import LabelledData
from .convert_report import ExitSearchReport

_GAIN_COST, _GAIN_ACCURACY = 0.01, 0.001  # shares of the static model's cost, of the samples

Value = tuple[float, float]  # to be as small as possible: what is asked for, as a share, and the mean cost


def search_exits(
    dynamic: DynamicModel, calibration: LabelledData, goal: Goal, *, device: torch.device | str | None = None
) -> tuple[DynamicModel, ExitSearchReport]:
    """The model with the exits that are worth having, and the report.

    Args:
        goal: accuracy that may be lost against the final exit at the least cost, or a budget at the best accuracy. An
            exit gains 1 % of the static model's cost, or 0.1 points of accuracy, or goes. Leaving is by max-softmax.

    Raises:
        RequestError: no exit is worth its head.
    """
    cached, budget = collect_cached(dynamic, calibration, device), goal.budget
    temperatures = [c.temperature for c in calibrate_exits(cached.logits[:-1], cached.labels)]
    calibrated = [z / t for z, t in zip(cached.logits, (*temperatures, 1.0), strict=True)]
    if goal.least == "latency":
        policy = ExitPolicy("max-softmax", (1.0,) * len(temperatures))
        cached = cached.timed(time_costs(dynamic, calibration, policy, batch=goal.leaving.latency_batch, device=device))
    *_, total = accumulate(cached.stage_costs)
    full = float(cached.right[-1].mean())

    def value(kept: Sequence[int]) -> Value:
        if not kept:
            return (1.0, 1.0) if budget is None else (-full if budget >= 1 else 0.0, 1.0)
        point = _point(
            _search(cached, calibrated, kept), full - goal.max_loss, None if budget is None else budget * total
        )
        if point is None:
            return (0.0, 1.0)
        return (point.mean_cost / total if budget is None else -point.accuracy, point.mean_cost / total)

    kept = choose_subset(len(temperatures), value, _GAIN_COST if budget is None else _GAIN_ACCURACY)
    if not kept:
        raise RequestError(
            "no exit is worth its head: every one saves less than it costs at the accuracy asked; allow a larger "
            "max_loss or train longer"
        )
    report = _report(dynamic.exits, kept, goal, *value(kept))
    return DynamicModel(KeepExits(tuple(kept))(dynamic.trunk).gm).eval(), report


def _report(at: Sequence[str], kept: Sequence[int], goal: Goal, reached: float, mean: float) -> ExitSearchReport:
    return ExitSearchReport(
        candidates=tuple(at),
        kept=tuple(at[k] for k in kept),
        mean_macs_share=mean if goal.least == "macs" else None,
        mean_latency_share=mean if goal.least == "latency" else None,
        accuracy=None if goal.budget is None else -reached,
    )


def _search(cached: Cached, calibrated: Sequence[Tensor], kept: Sequence[int]) -> ThresholdSearch:
    """Thresholds of these exits alone: between two of them, all stages are paid for at once."""
    *spent, total = accumulate(cached.stage_costs)
    bounds = [0, *(spent[k] for k in kept), total]
    logits = [*(calibrated[k] for k in kept), calibrated[-1]]
    stages, heads = [b - a for a, b in pairwise(bounds)], [cached.head_costs[k] for k in kept]
    return ThresholdSearch(logits, cached.labels, stages, heads, cost_unit=cached.cost_unit)


def _point(search: ThresholdSearch, accuracy: float, cost: float | None) -> OperatingPoint | None:
    """The best point; None where even the first exit is beyond the budget."""
    if cost is None:
        return search.for_accuracy(min(accuracy, search.best_accuracy))
    try:
        return search.for_cost(cost)
    except RequestError:
        return None


def choose_subset(count: int, value: Callable[[Sequence[int]], Value], least_gain: float) -> list[int]:
    """Indices 0..count - 1 whose `value` is small, in order; each of them lowers it by `least_gain` or more."""
    kept: list[int] = []
    best = value(kept)
    while True:
        tried = [(value(sorted([*kept, k])), k) for k in range(count) if k not in kept]
        reached, k = min(tried, default=(best, -1))
        if best[0] - reached[0] < least_gain:
            break
        kept, best = sorted([*kept, k]), reached
    for k in list(kept):
        without = [other for other in kept if other != k]
        if value(without)[0] - best[0] < least_gain:
            kept, best = without, value(without)
    return kept
