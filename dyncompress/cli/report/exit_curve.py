"""The curve of a dynamic model: policies chosen on the calibration split for many budgets, judged on the test one."""

from collections.abc import Callable

import torch

from ...compress.evaluation.evaluate import Evaluation, collect_logits, evaluate
from ...compress.thresholds.candidates import Cached
from ...compress.thresholds.operating_points import OperatingPoint
from ...model_zoo.load_data import Splits
from ...passes.exits.stages import split_stages
from ...runtime.predict.dynamic import DynamicModel
from ...runtime.predict.policy import ExitPolicy


def tradeoff(model: DynamicModel, data: Splits, device: torch.device) -> list[dict[str, float | None]]:
    """Points of accuracy (0..1) and mean_macs per sample, by rising MACs, of the model's table of budgets."""
    play = _player(model, data, device)
    points = [play(row.policy) for row in model.table]
    points.sort(key=lambda point: (point.mean_macs, point.accuracy))
    return [{"mean_macs": point.mean_macs, "accuracy": point.accuracy} for point in points]


def _player(
    model: DynamicModel, data: Splits, device: torch.device
) -> Callable[[ExitPolicy], OperatingPoint | Evaluation]:
    """What a policy does on the test split. With skip gates a sample's cost is known only when it has run."""
    if model.gates:
        return lambda policy: evaluate(model.with_policy(policy), data.test, device=device)
    stages = split_stages(model.trunk)
    logits, labels = collect_logits(model, data.test, device=device)
    return Cached(logits, labels, [s.macs for s in stages], [s.head_macs for s in stages[:-1]]).play
