"""Exit thresholds: which confidence each exit asks for, chosen together on the calibration set.

A sample leaves at the first exit k whose score s_k reaches t_k. With l_k(i) the number of candidate thresholds that
sample i reaches at exit k, every combination (j_1..j_K) of candidates is counted at once by cumulative histograms:

    right(j_1..j_K) = sum_k #{i : l_m(i) <= j_m for all m < k, l_k(i) > j_k, exit k is right about i}

and costs likewise, where a head counts for the samples that reach it, unless its exit is off. So the best combination
on the grid is exact. One exit's threshold at a time is then moved to its best place between any two samples, the others
fixed, until nothing improves.
"""

import copy
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from torch import Tensor

from ...errors import RequestError
from ...runtime.predict.policy import RULES, check_rule
from .operating_points import CostUnit, Floats, Ints, Objective, OperatingPoint, Search, exit_costs, lexargmin

_TABLE_SIZE = 250_000  # combinations of thresholds counted at once
_MAX_EXITS = 16


class ThresholdSearch(Search):
    """Searches the thresholds of K early exits.

    Args:
        logits: calibrated logits (N, classes) of every exit, early first, the final one last.
        labels: (N,) int64.
        stage_costs: of each stage for one sample without heads, one more than there are early exits.
        head_costs: of each early exit's head for one sample.
        cost_unit: of both.
        rule: a name in `runtime.policy.RULES`.

    Raises:
        RequestError: no samples, an unknown rule, more than 16 early exits.
    """

    def __init__(
        self,
        logits: Sequence[Tensor],
        labels: Tensor,
        stage_costs: Sequence[float],
        head_costs: Sequence[float],
        rule: str = "max-softmax",
        cost_unit: CostUnit = "MACs",
    ) -> None:
        _check(logits, labels, stage_costs, head_costs, rule)
        self.cost_unit = cost_unit
        self.stage_costs, self.head_costs = np.asarray(stage_costs, np.float64), np.asarray(head_costs, np.float64)
        self.right = np.stack([(z.argmax(-1) == labels).double().cpu().numpy() for z in logits])
        # scores are signed so that the higher is the surer; `worst` is the least there can be
        self.sign, self.worst = (1.0, 0.0) if RULES[rule].high_leaves else (-1.0, -1.0)
        scores = [self.sign * RULES[rule].score(z).double().cpu().numpy() for z in logits[:-1]]
        self.scores: Floats = np.stack(scores)

    def subset(self, rows: Ints) -> "ThresholdSearch":
        """The same search on some of the samples only."""
        part = copy.copy(self)
        for name in ("_grid", "_tables"):  # are the whole set's
            part.__dict__.pop(name, None)
        part.right, part.scores = self.right[:, rows], self.scores[:, rows]
        return part

    @property
    def exits(self) -> int:
        """The number of early exits."""
        return self.scores.shape[0]

    def right_with(self, thresholds: Sequence[float | None]) -> Floats:
        """Whether each sample is answered rightly under these thresholds: (N,) of 0 and 1."""
        inner = np.array([np.inf if t is None else self.sign * t for t in thresholds])
        return self.right[self._leave_at(inner), np.arange(self.samples)]

    def curve(self, points: int = 20) -> list[OperatingPoint]:
        """The best accuracy at `points` budgets evenly spaced from the cheapest choice to the dearest, in order."""
        right, spent = (table.ravel() for table in self._tables)
        order = np.lexsort((-right, spent))
        spent, best = spent[order], np.maximum.accumulate(right[order])
        within = np.searchsorted(spent, np.linspace(spent[0], spent[-1], points) * (1 + 1e-12), side="right") - 1
        cheapest = np.searchsorted(best, best[within])  # the first combination that is as good
        return [self._point(self._on_grid(order[i])) for i in dict.fromkeys(cheapest.tolist())]

    # --- every combination on a grid --------------------------------------------------------------------------------

    @cached_property
    def _grid(self) -> list[Floats]:
        levels = max(2, int(_TABLE_SIZE ** (1 / self.exits)))
        return [self._candidates(s, levels - 1) for s in self.scores]

    def _candidates(self, scores: Floats, count: int) -> Floats:
        """At most `count` ascending thresholds between neighbouring scores, at quantiles; the first lets all leave."""
        distinct = np.unique(np.append(scores, self.worst))
        between = (distinct[1:] + distinct[:-1]) / 2
        if len(between) <= count:
            return between
        picked = np.quantile(scores, np.linspace(0, 1, count), method="inverted_cdf")
        below = np.searchsorted(distinct, picked) - 1
        return between[np.unique(below.clip(min=0))]

    @cached_property
    def _tables(self) -> tuple[Floats, Floats]:
        """Right answers and costs of all samples for every combination of candidates; the last index means off."""
        levels = [np.searchsorted(g, s, side="right") for g, s in zip(self._grid, self.scores, strict=True)]
        shape = tuple(len(g) + 1 for g in self._grid)
        right, spent = np.zeros(shape), np.zeros(shape)

        def passed(k: int, weight: Floats, through: int) -> Floats:
            """Sums over the samples that pass all exits before k, per level at the exits k..through-1."""
            counted = shape[:through]
            cell = np.ravel_multi_index(levels[:through], counted) if through else np.zeros(self.samples, np.int64)
            table: Floats = np.bincount(cell, weight, minlength=math.prod(counted)).astype(np.float64)
            table = table.reshape(counted + (1,) * (self.exits - through))
            for axis in range(k):
                table = table.cumsum(axis)
            return table

        ones = np.ones(self.samples)
        for k in range(self.exits):
            reached = passed(k, ones, k)
            is_on = np.arange(shape[k]) < shape[k] - 1
            head = self.head_costs[k] * is_on.reshape([-1 if axis == k else 1 for axis in range(self.exits)])
            spent += reached * (self.stage_costs[k] + head)
            stay_or_leave = passed(k, self.right[k], k + 1)
            right += stay_or_leave.sum(k, keepdims=True) - stay_or_leave.cumsum(k)
        spent += passed(self.exits, ones, self.exits) * self.stage_costs[-1]
        right += passed(self.exits, self.right[-1], self.exits)
        return right, spent

    def _on_grid(self, index: int) -> Floats:
        places = np.unravel_index(index, self._tables[0].shape)
        return np.array([np.append(g, np.inf)[j] for g, j in zip(self._grid, places, strict=True)])

    # --- one exit at a time -----------------------------------------------------------------------------------------

    def _search(self, objective: Objective) -> OperatingPoint:
        first, second = objective(*self._tables)
        start = lexargmin(first.ravel(), second.ravel())
        thresholds, value = self._on_grid(start), (first.flat[start], second.flat[start])
        improved = True
        while improved:
            improved = False
            for k in range(self.exits):
                moves, right, spent = self._moves(thresholds, k)
                first, second = objective(right, spent)
                best = lexargmin(first, second)
                if (first[best], second[best]) < value:
                    thresholds[k], value, improved = moves[best], (first[best], second[best]), True
        return self._point(thresholds)

    def _moves(self, thresholds: Floats, k: int) -> tuple[Floats, Floats, Floats]:
        """All places for the threshold of exit k, the others fixed, with the right answers and costs of each."""
        without = thresholds.copy()
        without[k] = np.inf
        otherwise = self._leave_at(without)
        right, spent = self.right[otherwise, np.arange(self.samples)], self._costs(without)[otherwise]
        reach = np.flatnonzero(otherwise > k)
        reach = reach[np.argsort(-self.scores[k, reach], kind="stable")]
        more_right = np.cumsum(self.right[k, reach] - right[reach])
        more_spent = len(reach) * self.head_costs[k] + np.cumsum(self._costs(without)[k] - spent[reach])
        ordered = np.append(self.scores[k, reach], self.worst)
        last = np.flatnonzero(ordered[:-1] > ordered[1:])  # equal scores leave together
        places = (ordered[last] + ordered[last + 1]) / 2
        return (
            np.append(np.inf, places),
            right.sum() + np.append(0, more_right[last]),
            spent.sum() + np.append(0, more_spent[last]),
        )

    def _costs(self, thresholds: Floats) -> Floats:
        return exit_costs(self.stage_costs, self.head_costs, np.isfinite(thresholds))

    def _leave_at(self, thresholds: Floats) -> Ints:
        """The exit that answers each sample, the final one where none is sure: (N,)."""
        sure = np.vstack([self.scores >= thresholds[:, None], np.ones((1, self.samples), dtype=bool)])
        return sure.argmax(0)

    def _point(self, thresholds: Floats) -> OperatingPoint:
        at = self._leave_at(thresholds)
        used = np.where(np.isin(np.arange(self.exits), at), thresholds, np.inf)
        named = tuple(float(self.sign * t) if np.isfinite(t) else None for t in used)
        return OperatingPoint.of(
            named, at, self.right[at, np.arange(self.samples)], self._costs(used)[at], self.cost_unit
        )


def _check(
    logits: Sequence[Tensor], labels: Tensor, stage_costs: Sequence[float], head_costs: Sequence[float], rule: str
) -> None:
    check_rule(rule)
    if RULES[rule].remembers:
        raise RequestError(f"rule {rule!r} remembers the exits before, so its thresholds cannot be searched one by one")
    exits = len(logits) - 1
    if not 1 <= exits <= _MAX_EXITS:
        raise RequestError(f"thresholds can be searched for 1 to {_MAX_EXITS} early exits, not {exits}")
    if len(stage_costs) != exits + 1 or len(head_costs) != exits:
        raise RequestError(
            f"{exits} early exits make {exits + 1} stages and {exits} heads, "
            f"got the costs of {len(stage_costs)} stages and {len(head_costs)} heads"
        )
    if len(labels) == 0 or any(len(z) != len(labels) for z in logits):
        raise RequestError(f"thresholds need one label per sample, got {len(logits[0])} samples, {len(labels)} labels")
    if bool((labels < 0).any()):
        raise RequestError("the calibration set has samples without a label (-1): thresholds need labelled ones")
