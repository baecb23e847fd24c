"""What thresholds do on a calibration set, and the two questions that every search over them answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import RequestError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
# (right answers, MACs), both summed over the samples -> what to minimise first (infinite: not allowed) and second.
Objective = Callable[[Floats, Floats], tuple[Floats, Floats]]


@dataclass(frozen=True)
class OperatingPoint:
    """One choice of thresholds and what it does on the calibration set.

    thresholds: one per early exit, as `ExitPolicy` takes them; None = the exit is off.
    accuracy: 0..1. mean_macs: multiply-adds per sample. shares: of samples answered by each exit, the final one last.
    """

    thresholds: tuple[float | None, ...]
    accuracy: float
    mean_macs: float
    shares: tuple[float, ...]

    @classmethod
    def of(cls, thresholds: tuple[float | None, ...], at_N: Ints, right_N: Floats, macs_N: Floats) -> "OperatingPoint":
        """From the exit that answers each sample, whether rightly (0 or 1), and what that cost."""
        shares = np.bincount(at_N, minlength=len(thresholds) + 1) / len(at_N)
        return cls(thresholds, float(right_N.mean()), float(macs_N.mean()), tuple(shares.tolist()))


class Search(ABC):
    """A search over thresholds on a calibration set.

    right: (.., N) of 0 and 1, whether each sample is answered rightly, by exit or by choice.
    """

    right: Floats

    @property
    def samples(self) -> int:
        """The number of samples."""
        return self.right.shape[1]

    @property
    @abstractmethod
    def _tables(self) -> tuple[Floats, Floats]:
        """Right answers and MACs of all samples, for many choices."""

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
        """At most `points` choices that give the best accuracy for their mean MACs, by rising MACs."""

    @property
    def best_accuracy(self) -> float:
        """The highest accuracy (0..1) that can be reached."""
        return float(self._tables[0].max() / self.samples)

    @property
    def least(self) -> float:
        """The least mean MACs that can be reached."""
        return float(self._tables[1].min() / self.samples)

    def for_accuracy(self, accuracy: float) -> OperatingPoint:
        """The least mean MACs with at least this accuracy (0..1).

        Raises:
            RequestError: no thresholds reach it; the message says what is possible.
        """
        need = accuracy * self.samples - 1e-6
        if self.best_accuracy * self.samples < need:
            raise RequestError(
                f"no thresholds reach an accuracy of {accuracy:.4f} on the calibration set, the best is "
                f"{self.best_accuracy:.4f}: allow a larger loss or train longer"
            )
        return self._search(lambda right, macs: (np.where(right >= need, macs, np.inf), -right))

    def for_macs(self, macs: float) -> OperatingPoint:
        """The best accuracy with at most this many mean MACs per sample.

        Raises:
            RequestError: every choice costs more; the message says what is possible.
        """
        limit = macs * self.samples * (1 + 1e-9)
        if self._tables[1].min() > limit:
            raise RequestError(
                f"no thresholds keep the mean within {macs:.0f} MACs, the least is {self.least:.0f}: "
                "allow more or put the first exit earlier"
            )
        return self._search(lambda right, macs: (np.where(macs <= limit, -right, np.inf), macs))


def lexargmin(first: Floats, second: Floats) -> int:
    """The index of the least `first`, of those the least `second`."""
    ties = np.flatnonzero(first == first.min())
    return int(ties[second[ties].argmin()])


def exit_costs(stage_macs: npt.ArrayLike, head_macs: npt.ArrayLike, is_on: npt.ArrayLike) -> Floats:
    """What a sample that leaves at each exit has cost, the end last: (K + 1,) MACs; heads that are off are free.

    stage_macs: (K + 1,). head_macs, is_on: (K,).
    """
    heads = np.append(np.where(is_on, head_macs, 0.0), 0.0)
    return np.cumsum(np.asarray(stage_macs, np.float64) + heads)
