"""What `prune` and `prune_weights` report."""

from dataclasses import dataclass, field
from typing import ClassVar

from ..evaluation.reports import Report
from .kept_indices import KeptAxis


@dataclass(frozen=True, kw_only=True)
class CutReport:
    """One cut: the share of the first model that was asked for, and that is left.

    Where latency was the target: the shares of the model before this cut that were predicted and measured, and the
    milliseconds of that model.
    """

    goal: float
    left: float
    predicted: float | None = None
    measured: float | None = None
    whole_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class PruneReport(Report):
    """What `prune` did: what it counted and ranked by, every cut, and what is kept of every axis of the original."""

    verb: ClassVar[str] = "prune"
    metric: str
    importance: str
    steps: tuple[CutReport, ...]
    kept: dict[str, KeptAxis] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PruneWeightsReport(Report):
    """What `prune_weights` did: the share of zeros that was asked for, and that each weight has, by name."""

    verb: ClassVar[str] = "prune_weights"
    sparsity: float
    scope: str
    zeros: dict[str, float]
