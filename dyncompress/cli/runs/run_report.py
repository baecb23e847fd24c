"""What a run reports: report.json in its folder, and what --json prints."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...compress.evaluation.report_entries import DynamicEntry, Entry, StaticEntry
from ...compress.evaluation.reports import from_json, to_json
from ...compress.gates.gate_report import GateReport
from ...compress.pruning.reports import PruneReport
from ...compress.sparsity.sparsify_report import SparsifyReport
from ...compress.thresholds.policy_report import CurvePoint, LatencyReport
from ...compress.thresholds.risk import Promise
from ..report.layers import LayerChange
from .exporting import OnnxCheck


@dataclass(frozen=True, kw_only=True)
class GateSummary(GateReport):
    """What `gate` did, the MACs per sample of each branch, and a line where skipping does not pay here."""

    branch_macs: tuple[int, ...]
    note: str | None


@dataclass(frozen=True, kw_only=True)
class LeavingSummary:
    """What exits do: accuracy over mean MACs on the test split, what was promised, what thresholds were chosen by."""

    curve: tuple[CurvePoint, ...]
    risk: Promise | None
    exit_costs: LatencyReport | None


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The paths of the result, the compared models by name, and what the steps say; in JSON the models, and what exits
    do, stand at the top level."""

    model: str
    run_dir: str
    data: str | None
    device: str
    onnx: str | None
    entries: dict[str, Entry]
    check: OnnxCheck | None = None
    layers: tuple[LayerChange, ...] | None = None
    prune: PruneReport | None = None
    sparsify: SparsifyReport | None = None
    gate: GateSummary | None = None
    leaving: LeavingSummary | None = None

    def to_json(self) -> dict[str, Any]:
        """As report.json holds it."""
        plain = to_json(self)
        entries, leaving = plain.pop("entries"), plain.pop("leaving", {})
        return {**plain, **leaving, **entries}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "RunReport":
        """Of a report.json."""
        leaving = {"leaving": plain} if "curve" in plain else {}
        report = from_json(cls, {**plain, **leaving, "entries": {}})
        report.entries.update({name: _entry(value) for name, value in entries_in(plain).items()})
        return report


def entries_in(plain: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The compared models in a report.json, by name."""
    return {name: value for name, value in plain.items() if isinstance(value, dict) and "latency_ms" in value}


def _entry(plain: Mapping[str, Any]) -> Entry:
    return from_json(DynamicEntry, plain) if "mean_macs" in plain else from_json(StaticEntry, plain)
