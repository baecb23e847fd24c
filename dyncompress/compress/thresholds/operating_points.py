"""What thresholds do on a calibration set, and the two questions that every search over them answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...errors import RequestError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
CostUnit = Literal["MACs", "ms"]  # multiply-adds, or milliseconds as measured on a device
# (right answers, costs), both summed over the samples -> what to minimise first (infinite: not allowed) and second.
Objective = Callable[[Floats, Floats], tuple[Floats, Floats]]


@dataclass(frozen=True)
class OperatingPoint:
    """One choice of thresholds and what it does on the calibration set.

    thresholds: one per early exit, as `ExitPolicy` takes them; None = the exit is off.
    accuracy: 0..1. mean_cost: of a sample, in `cost_unit`. shares: of the samples, answered by each exit, the final one
    last.
    """

    thresholds: tuple[float | None, ...]
    accuracy: float
    mean_cost: float
    cost_unit: CostUnit
    shares: tuple[float, ...]

    @classmethod
    def of(
        cls, thresholds: tuple[float | None, ...], at_N: Ints, right_N: Floats, cost_N: Floats, unit: CostUnit
    ) -> "OperatingPoint":
        """From the exit that answers each sample, whether rightly (0 or 1), and what that cost."""
        shares = np.bincount(at_N, minlength=len(thresholds) + 1) / len(at_N)
        return cls(thresholds, float(right_N.mean()), float(cost_N.mean()), unit, tuple(shares.tolist()))


class Search(ABC):
    """A search over thresholds on a calibration set.

    right: (.., N) of 0 and 1, whether each sample is answered rightly, by exit or by choice. cost_unit: of all costs.
    """

    right: Floats
    cost_unit: CostUnit

    @property
    def samples(self) -> int:
        """The number of samples."""
        return self.right.shape[1]

    @property
    @abstractmethod
    def _tables(self) -> tuple[Floats, Floats]:
        """Right answers and costs of all samples, for many choices."""

    @abstractmethod
    def _search(self, objective: Objective) -> OperatingPoint:
        """The choice that minimises the objective."""

    @abstractmethod
    def subset(self, rows: Ints) -> "Search":
        """The same search on some of the samples only."""

    @abstractmethod
    def right_with(self, thresholds: Sequence[float | None]) -> Floats:
        """Whether each sample is answered rightly under these thresholds: (N,) of 0 and 1."""

    @abstractmethod
    def curve(self, points: int = 20) -> list[OperatingPoint]:
        """At most `points` choices that give the best accuracy for their mean cost, by rising cost."""

    @property
    def best_accuracy(self) -> float:
        """The highest accuracy (0..1) that can be reached."""
        return float(self._tables[0].max() / self.samples)

    @property
    def least_cost(self) -> float:
        """The least mean cost that can be reached."""
        return float(self._tables[1].min() / self.samples)

    def for_accuracy(self, accuracy: float) -> OperatingPoint:
        """The least mean cost with at least this accuracy (0..1).

        Raises:
            RequestError: no thresholds reach it; the message says what is possible.
        """
        need = accuracy * self.samples - 1e-6
        if self.best_accuracy * self.samples < need:
            raise RequestError(
                f"no thresholds reach an accuracy of {accuracy:.4f} on the calibration set, the best is "
                f"{self.best_accuracy:.4f}: allow a larger loss or train longer"
            )
        return self._search(lambda right, costs: (np.where(right >= need, costs, np.inf), -right))

    def for_cost(self, cost: float) -> OperatingPoint:
        """The best accuracy with at most this mean cost of a sample.

        Raises:
            RequestError: every choice costs more; the message says what is possible.
        """
        limit = cost * self.samples * (1 + 1e-9)
        if self._tables[1].min() > limit:
            raise RequestError(
                f"no thresholds keep the mean within {cost:.4g} {self.cost_unit}, the least is {self.least_cost:.4g}: "
                "allow more or put the first exit earlier"
            )
        return self._search(lambda right, costs: (np.where(costs <= limit, -right, np.inf), costs))


def lexargmin(first: Floats, second: Floats) -> int:
    """The index of the least `first`, of those the least `second`."""
    ties = np.flatnonzero(first == first.min())
    return int(ties[second[ties].argmin()])


def exit_costs(stage_costs: npt.ArrayLike, head_costs: npt.ArrayLike, is_on: npt.ArrayLike) -> Floats:
    """What a sample that leaves at each exit has cost, the end last: (K + 1,); heads that are off are free.

    stage_costs: (K + 1,). head_costs, is_on: (K,).
    """
    heads = np.append(np.where(is_on, head_costs, 0.0), 0.0)
    return np.cumsum(np.asarray(stage_costs, np.float64) + heads)
