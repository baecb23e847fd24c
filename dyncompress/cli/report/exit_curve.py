"""The curve of a dynamic model: policies chosen on the calibration split for many budgets, judged on the test one."""

from collections.abc import Sequence

import torch

from ...compress.evaluation.evaluate import collect_logits, evaluate
from ...compress.thresholds.candidates import Cached
from ...compress.thresholds.policy_report import CurvePoint
from ...model_zoo.load_data import Splits
from ...passes.exits.stages import split_stages
from ...runtime.predict.dynamic import DynamicModel
from ...runtime.predict.policy import ExitPolicy


def tradeoff(model: DynamicModel, data: Splits, device: torch.device) -> tuple[CurvePoint, ...]:
    """The policies of the model's table of budgets, by rising MACs."""
    policies = [row.policy for row in model.table]
    points = _run(model, policies, data, device) if model.gates else _played(model, policies, data, device)
    return tuple(sorted(points, key=lambda point: (point.mean_macs, point.accuracy)))


def _run(model: DynamicModel, policies: Sequence[ExitPolicy], data: Splits, device: torch.device) -> list[CurvePoint]:
    """With skip gates a sample's cost is known only when it has run."""
    points = []
    for policy in policies:
        found = evaluate(model.with_policy(policy), data.test, device=device)
        assert found.mean_macs is not None
        points.append(CurvePoint(mean_macs=found.mean_macs, accuracy=found.accuracy))
    return points


def _played(
    model: DynamicModel, policies: Sequence[ExitPolicy], data: Splits, device: torch.device
) -> list[CurvePoint]:
    stages = split_stages(model.trunk)
    logits, labels = collect_logits(model, data.test, device=device)
    cached = Cached(logits, labels, [s.macs for s in stages], [s.head_macs for s in stages[:-1]])
    return [CurvePoint(mean_macs=point.mean_cost, accuracy=point.accuracy) for point in map(cached.play, policies)]
