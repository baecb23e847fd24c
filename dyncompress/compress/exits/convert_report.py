"""What `convert` reports, all of it measured on the calibration set."""

from dataclasses import dataclass
from typing import ClassVar

from ..evaluation.exit_quality import ExitQuality
from ..evaluation.reports import Report
from ..thresholds.policy_report import PolicyReport
from ..training.trainer import Epoch


@dataclass(frozen=True, kw_only=True)
class ExitSearchReport:
    """Nodes of all exits that were trained and of those that are kept; what the kept ones cost and reach.

    The mean cost is a share of the static model's, in MACs or in milliseconds, whichever was to be least. accuracy:
    0..1, None where it was not what was sought.
    """

    candidates: tuple[str, ...]
    kept: tuple[str, ...]
    mean_macs_share: float | None = None
    mean_latency_share: float | None = None
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class ConvertReport(PolicyReport, Report):
    """The training, the exits that were searched, and what `choose_policy` reports."""

    verb: ClassVar[str] = "convert"
    history: tuple[Epoch, ...]
    exit_search: ExitSearchReport | None = None


@dataclass(frozen=True, kw_only=True)
class PerPositionReport(Report):
    """Of a model that answers at every position: the training, and what every exit answers."""

    verb: ClassVar[str] = "convert"
    history: tuple[Epoch, ...]
    exits: tuple[ExitQuality, ...]
