"""The curve of a dynamic model: thresholds chosen on the calibration split for many budgets, judged on the test one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..compress.evaluate import collect_logits
from ..compress.thresholds import ThresholdSearch
from ..model_zoo.data import Splits
from ..passes.stages import Stage, split_stages
from ..runtime.dynamic import DynamicModel
from ..runtime.policy import ExitPolicy


def tradeoff(model: DynamicModel, data: Splits, device: torch.device) -> list[dict[str, float]]:
    """Points of accuracy (0..1) and mean_macs per sample, by rising MACs; the model keeps its rule and temperatures."""
    policy = model.policy
    assert policy is not None
    stages = split_stages(model.trunk)
    logits, labels = collect_logits(model, data.calibration, device=device)
    search = ThresholdSearch(
        [z / t for z, t in zip(logits, (*policy.temperatures, 1.0), strict=True)],
        labels,
        [stage.macs for stage in stages],
        [stage.head_macs for stage in stages[:-1]],
        policy.rule,
    )
    logits, labels = collect_logits(model, data.test, device=device)
    policies = [ExitPolicy(policy.rule, point.thresholds, policy.temperatures) for point in search.curve()]
    points = [_judge(candidate, stages, logits, labels) for candidate in policies]
    return [{"mean_macs": macs, "accuracy": accuracy} for macs, accuracy in sorted(points)]


def _judge(
    policy: ExitPolicy, stages: Sequence[Stage], logits: Sequence[Tensor], labels: Tensor
) -> tuple[float, float]:
    """Mean MACs and accuracy, from every exit's logits (N, classes)."""
    undecided = torch.ones(len(labels), dtype=torch.bool)
    right = macs = 0
    for k, (stage, z) in enumerate(zip(stages, logits, strict=True)):
        last = k == len(stages) - 1
        on = not last and policy.is_on(k)
        macs += int(undecided.sum()) * (stage.macs + on * stage.head_macs)
        leaving = undecided if last else undecided & policy.leaves(k, z)
        right += int((z.argmax(-1) == labels)[leaving].sum())
        undecided = undecided & ~leaving
    return macs / len(labels), right / len(labels)
