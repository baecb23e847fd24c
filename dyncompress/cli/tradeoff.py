"""The curve of a dynamic model: policies chosen on the calibration split for many budgets, judged on the test one."""

import torch

from ..compress.candidates import Cached
from ..compress.evaluate import collect_logits
from ..model_zoo.data import Splits
from ..passes.stages import split_stages
from ..runtime.dynamic import DynamicModel


def tradeoff(model: DynamicModel, data: Splits, device: torch.device) -> list[dict[str, float]]:
    """Points of accuracy (0..1) and mean_macs per sample, by rising MACs, of the model's table of budgets."""
    stages = split_stages(model.trunk)
    logits, labels = collect_logits(model, data.test, device=device)
    test = Cached(logits, labels, [s.macs for s in stages], [s.head_macs for s in stages[:-1]])
    points = [test.play(row.policy) for row in model.table]
    points.sort(key=lambda point: (point.mean_macs, point.accuracy))
    return [{"mean_macs": point.mean_macs, "accuracy": point.accuracy} for point in points]
