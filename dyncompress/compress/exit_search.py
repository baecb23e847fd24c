"""Which exits are worth having, once heads are trained at every candidate place.

An exit is kept when the best thresholds with it beat the best without it by more than a call costs beyond its MACs: a
head that is too dear, or answers too few, does not. Greedy: the exit that gains most is added until none gains enough,
then each is left out again that no longer does. An exit that is not kept costs nothing.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from ..errors import RequestError
from ..passes.exits import keep_exits
from ..passes.stages import split_stages
from ..runtime.dynamic import DynamicModel
from .batches import LabelledData
from .calibrate import calibrate_exits
from .distill import UNLABELLED
from .evaluate import collect_logits
from .thresholds import OperatingPoint, ThresholdSearch

_GAIN_MACS, _GAIN_ACCURACY = 0.01, 0.001  # shares of the static model's MACs, of the samples

Value = tuple[float, float]  # to be as small as possible: what is asked for, as a share, and the mean MACs


def search_exits(
    dynamic: DynamicModel,
    calibration: LabelledData,
    *,
    max_loss: float = 0.005,
    macs: float | None = None,
    rule: str = "max-softmax",
    device: torch.device | str | None = None,
) -> tuple[DynamicModel, dict[str, Any]]:
    """The model with the exits that are worth having, and the report: candidates and, by node, what was kept.

    Args:
        max_loss: accuracy (0..1) that may be lost against the final exit, at the least mean MACs.
        macs: instead, mean MACs as a share of the static model's, at the best accuracy.
        rule: one without memory; an exit gains 1 % of the static model's MACs, or 0.1 points of accuracy, or goes.

    Raises:
        RequestError: no exit is worth its head.
    """
    logits, labels = collect_logits(dynamic, calibration, device=device)
    logits = tuple(z[labels != UNLABELLED] for z in logits)
    labels = labels[labels != UNLABELLED]
    temperatures = [c.temperature for c in calibrate_exits(logits[:-1], labels)]
    calibrated = [z / t for z, t in zip(logits, (*temperatures, 1.0), strict=True)]
    *stages, last = split_stages(dynamic.trunk)
    spent = list(accumulate(stage.macs for stage in stages))
    total = spent[-1] + last.macs
    full = float((logits[-1].argmax(-1) == labels).double().mean())

    def value(kept: Sequence[int]) -> Value:
        if not kept:
            return (1.0, 1.0) if macs is None else (-full if macs >= 1 else 0.0, 1.0)
        bounds = [0, *(spent[k] for k in kept), total]
        search = ThresholdSearch(
            [*(calibrated[k] for k in kept), calibrated[-1]],
            labels,
            [b - a for a, b in pairwise(bounds)],
            [stages[k].head_macs for k in kept],
            rule,
        )
        point = _point(search, full - max_loss, None if macs is None else macs * total)
        if point is None:
            return (0.0, 1.0)
        return (point.mean_macs / total if macs is None else -point.accuracy, point.mean_macs / total)

    kept = choose_subset(len(stages), value, _GAIN_MACS if macs is None else _GAIN_ACCURACY)
    if not kept:
        raise RequestError(
            "no exit is worth its head: every one saves less than it costs at the accuracy asked; allow a larger "
            "max_loss or train longer"
        )
    at = dynamic.exits
    reached, mean = value(kept)
    report = {
        "candidates": at,
        "kept": [at[k] for k in kept],
        "mean_macs_share": mean,
        "accuracy": None if macs is None else -reached,
    }
    return DynamicModel(keep_exits(dynamic.trunk, kept)).eval(), report


def _point(search: ThresholdSearch, accuracy: float, macs: float | None) -> OperatingPoint | None:
    """The best point; None where even the first exit is beyond the budget."""
    if macs is None:
        return search.for_accuracy(min(accuracy, search.best_accuracy))
    try:
        return search.for_macs(macs)
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
