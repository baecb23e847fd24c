"""Reports become JSON and come back; what is absent is the default."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

import dyncompress as dc
from dyncompress.cli.runs.run_report import LeavingSummary, RunReport
from dyncompress.compress.evaluation.evaluate import ExitUse
from dyncompress.compress.evaluation.report_entries import DynamicEntry, StaticEntry
from dyncompress.compress.evaluation.reports import Report, from_json, to_json
from dyncompress.compress.pruning.kept_indices import KeptAxis
from dyncompress.compress.pruning.reports import CutReport, PruneReport
from dyncompress.compress.thresholds.policy_report import CurvePoint


@dataclass(frozen=True, kw_only=True)
class Inner:
    value: float


@dataclass(frozen=True, kw_only=True)
class Tried(Report):
    verb: ClassVar[str] = "try"
    rows: tuple[tuple[int, ...], ...]
    known: Inner | None
    by_name: dict[str, Inner]
    extra: Inner | None = None
    more: dict[str, int] = field(default_factory=dict)


TRIED = Tried(rows=((1, 2), ()), known=None, by_name={"a": Inner(value=0.5)})


@pytest.mark.parametrize("tried", [TRIED, replace(TRIED, known=Inner(value=1), extra=Inner(value=2), more={"b": 3})])
def test_they_come_back(tried: Tried) -> None:
    assert from_json(Tried, to_json(tried)) == tried


def test_what_is_absent_is_the_default() -> None:
    plain = {"rows": [[1, 2], []], "known": None, "by_name": {"a": {"value": 0.5}}}
    assert to_json(TRIED) == plain
    assert from_json(Tried, {**plain, "of another version": 1}) == TRIED


def test_a_model_carries_them() -> None:
    gm = dc.capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    assert not Tried.is_in(gm)
    with pytest.raises(dc.RequestError, match="carries no report of try"):
        Tried.of(gm)
    TRIED.keep_in(gm)
    assert Tried.of(gm) == TRIED


def test_what_prune_did_is_known_by_name() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    small = dc.prune(dc.capture(net, torch.randn(2, 4)), ratio=0.5)
    done = PruneReport.of(small)
    assert (done.metric, done.importance, done.steps) == ("ratio", "l2", (CutReport(goal=0.5, left=0.5),))
    (axis,) = done.kept.values()
    assert axis == KeptAxis("neurons", 8, axis.kept) and len(axis.kept) == small.get_submodule("0").out_features == 4


def test_a_run_report_is_flat_in_json() -> None:
    static = StaticEntry(accuracy=0.9, macs=10, parameters=3, bytes=12, latency_ms={"1": 0.5})
    uses = (ExitUse("a", 4, 0.5, 1.0), ExitUse("output", 10, 0.5, None))
    dynamic = DynamicEntry(accuracy=0.8, mean_macs=7.0, exits=uses, parameters=4, bytes=16, latency_ms={"1": 0.4})
    leaving = LeavingSummary(curve=(CurvePoint(mean_macs=7.0, accuracy=0.8),), risk=None, exit_costs=None)
    report = RunReport(
        model="m", run_dir="r", data=None, device="cpu", onnx=None, leaving=leaving,
        entries={"static": static, "dynamic": dynamic},
    )  # fmt: skip
    plain = report.to_json()
    assert plain["static"] == {"accuracy": 0.9, "macs": 10, "parameters": 3, "bytes": 12, "latency_ms": {"1": 0.5}}
    assert plain["dynamic"]["exits"][1] == {"at": "output", "macs": 10, "share": 0.5, "accuracy": None}
    assert set(plain) == {
        "model",
        "run_dir",
        "data",
        "device",
        "onnx",
        "static",
        "dynamic",
        "curve",
        "risk",
        "exit_costs",
    }
    assert plain["risk"] is None and RunReport.from_json(plain) == report
