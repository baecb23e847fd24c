"""What `choose_policy` reports, all of it measured on the calibration set."""

from dataclasses import dataclass

from ...runtime.predict.policy import ExitPolicy
from .calibrate import Calibration
from .risk import Promise


@dataclass(frozen=True, kw_only=True)
class StaticPoint:
    """Accuracy (0..1) of a model whose samples all run to the end, and its MACs per sample where they are its own."""

    accuracy: float
    macs: int | None = None


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Mean MACs per sample and accuracy (0..1) under one policy."""

    mean_macs: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class ExitReport(Calibration):
    """An exit, the final one ("output") included: the node it follows, the share of the samples that it answers, its
    accuracy (0..1) on all samples, and its calibration."""

    at: str
    share: float
    accuracy_on_all: float


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """Milliseconds per sample at one batch size: measured of the static model, of stages and of heads; expected of the
    chosen policy."""

    batch: int
    static_ms: float
    mean_ms: float
    stages_ms: tuple[float, ...]
    heads_ms: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class PolicyReport:
    """What the chosen policy does, beside the static model and the final exit alone; and what others would, `curve`.

    latency: None where costs are MACs. risk: None where none was promised.
    """

    samples: int
    static: StaticPoint
    final: StaticPoint
    dynamic: CurvePoint
    exits: tuple[ExitReport, ...]
    policy: ExitPolicy
    curve: tuple[CurvePoint, ...]
    latency: LatencyReport | None
    risk: Promise | None
