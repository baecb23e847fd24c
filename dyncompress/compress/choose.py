"""The exit policy of a trained dynamic model: temperatures, then thresholds, from the calibration set alone."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from ..passes.stages import split_stages
from ..runtime.dynamic import DynamicModel
from ..runtime.policy import RULES, ExitPolicy
from .batches import LabelledData
from .calibrate import calibrate_exits
from .distill import UNLABELLED
from .evaluate import collect_logits
from .slack import held_out_slack
from .thresholds import OperatingPoint, ThresholdSearch


def choose_policy(
    dynamic: DynamicModel,
    calibration: LabelledData,
    *,
    rule: str = "max-softmax",
    max_loss: float = 0.005,
    macs: float | None = None,
    static_logits: Tensor | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Sets `dynamic.policy` for a stated accuracy loss or a stated budget; another one is another call, no training.

    Args:
        calibration: map-style, of (inputs, int label), not trained on; samples with label -1 are left out.
        rule: "max-softmax" or "entropy" (`runtime.policy`).
        max_loss: accuracy (0..1) that may be lost on unseen samples. On the calibration set less is given away, see
            `slack`, unless more cannot be reached.
        macs: instead, a budget: mean MACs as a share of the static model's.
        static_logits: (N, classes) on the same samples, of the model that the loss counts from; None = the final exit.

    Returns:
        What was measured on the calibration set, as plain numbers, text and lists: static, final and dynamic accuracy
        and MACs, every exit's temperature and ECE before and after, the policy, the curve of accuracy over mean MACs.

    Raises:
        RequestError: no labelled samples, or thresholds that do what is asked do not exist.
    """
    check_goal(rule, max_loss, macs)
    logits, labels = collect_logits(dynamic, calibration, device=device)
    static = logits[-1] if static_logits is None else static_logits
    *logits_of_exits, static = (z[labels != UNLABELLED] for z in (*logits, static))
    labels = labels[labels != UNLABELLED]
    calibrations = calibrate_exits(logits_of_exits, labels)
    temperatures = tuple(c.temperature for c in calibrations[:-1])
    stages = split_stages(dynamic.trunk)
    search = ThresholdSearch(
        [z / t for z, t in zip(logits_of_exits, (*temperatures, 1.0), strict=True)],
        labels,
        [stage.macs for stage in stages],
        [stage.head_macs for stage in stages[:-1]],
        rule,
    )
    if macs is None:
        point = _within_loss(search, static.argmax(-1) == labels, max_loss)
    else:
        point = search.for_macs(macs * dynamic.static_macs)
    dynamic.policy = ExitPolicy(rule, point.thresholds, temperatures)
    return {
        "samples": len(labels),
        "static": {"accuracy": accuracy(static, labels), "macs": dynamic.static_macs},
        "final": {"accuracy": accuracy(logits_of_exits[-1], labels)},
        "dynamic": {"accuracy": point.accuracy, "mean_macs": point.mean_macs},
        "exits": [
            {"at": at, "share": share, "accuracy_on_all": accuracy(z, labels), **asdict(fitted)}
            for at, share, z, fitted in zip(
                [*dynamic.exits, "output"], point.shares, logits_of_exits, calibrations, strict=True
            )
        ],
        "policy": dynamic.policy.to_dict(),
        "curve": [{"mean_macs": p.mean_macs, "accuracy": p.accuracy} for p in search.curve()],
    }


def _within_loss(search: ThresholdSearch, static_right: Tensor, max_loss: float) -> OperatingPoint:
    static_accuracy = float(static_right.double().mean())
    target = static_accuracy - held_out_slack(search, static_right, max_loss)
    return search.for_accuracy(max(static_accuracy - max_loss, min(target, search.best_accuracy)))


def check_goal(rule: str, max_loss: float, macs: float | None) -> None:
    """Raises RequestError for a goal that no model could have."""
    if rule not in RULES:
        raise RequestError(f"unknown exit rule {rule!r}; the rules are: {', '.join(RULES)}")
    if not 0 <= max_loss < 1:
        raise RequestError(f"max_loss is {max_loss}: give the accuracy that may be lost, e.g. 0.005 for half a point")
    if macs is not None and not 0 < macs <= 1:
        raise RequestError(f"macs is {macs}: give a share of the static model's MACs, e.g. 0.5")


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share (0..1) of rows of (N, classes) logits whose largest one is the label."""
    return float((logits.argmax(-1) == labels).double().mean())
