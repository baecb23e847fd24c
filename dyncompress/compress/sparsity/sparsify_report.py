"""What `sparsify` reports."""

from dataclasses import dataclass, field
from typing import ClassVar

from ..evaluation.reports import Report
from ..pruning.kept_indices import KeptAxis


@dataclass(frozen=True, kw_only=True)
class SurgeryReport:
    """What left after one epoch: how many groups live on of how many there were, and the share of the first model.

    strength: lambda then. difference: the largest change of the answers, as a share of the largest answer.
    """

    epoch: int
    live: int
    groups: int
    left: float
    strength: float
    difference: float


@dataclass(frozen=True, kw_only=True)
class SparsifyReport(Report):
    """What `sparsify` did.

    metric, target: what was counted, and the share of it that was to stay, None with a lambda by hand. learned: the
    share that group lasso left; left: that is left after what it did not reach was cut. batch_sizes: by epoch. kept: of
    every axis of the original.
    """

    verb: ClassVar[str] = "sparsify"
    metric: str
    target: float | None
    kinds: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    learned: float
    left: float
    surgeries: tuple[SurgeryReport, ...]
    kept: dict[str, KeptAxis] = field(default_factory=dict)
