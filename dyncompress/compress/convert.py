"""convert: a trained static network becomes one that answers easy samples early.

1. capture, and insert the exits;
2. train the heads by self-distillation, on a frozen trunk or together with it;
3. calibrate: one temperature per exit;
4. choose the thresholds: the cheapest that keep the static model's accuracy, or the most accurate within a budget.

Steps 3 and 4 see the calibration set only.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx, nn

from ..errors import RequestError
from ..passes.capture import Inputs, capture
from ..passes.exits import InsertExits
from ..runtime.dynamic import DynamicModel
from .batches import LabelledData, device_of_model, examples_of, size_of, split_off, to_device
from .choose import RiskKind, SearchKind, check_goal, choose_policy
from .distill import SelfDistillation
from .evaluate import collect_logits
from .trainer import Epoch, fit, training_device

_CALIBRATION_SHARE = 0.15  # of a data set that comes without splits


@runtime_checkable
class HasSplits(Protocol):
    """Data that comes divided: `train` fits the weights, `calibration` the temperatures and thresholds."""

    @property
    def train(self) -> LabelledData: ...

    @property
    def calibration(self) -> LabelledData: ...


def convert(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    exits: int | Sequence[str] = 3,
    *,
    data: HasSplits | LabelledData | None = None,
    epochs: int = 4,
    lr: float = 1e-2,
    trunk_lr: float = 0.01,
    batch_size: int = 128,
    freeze_trunk: bool = True,
    rule: str = "max-softmax",
    threshold_search: SearchKind | None = None,
    max_loss: float = 0.005,
    macs: float | None = None,
    risk: float | None = None,
    confidence: float = 0.9,
    risk_of: RiskKind = "disagreement",
    seed: int = 0,
    mixed_precision: str | None = None,
    device: torch.device | str | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> DynamicModel:
    """A dynamic copy of `model`: early exits, trained and calibrated, with thresholds; in eval mode, on its device.

    What was measured on the calibration set is in `result.trunk.meta["info"]["convert"]`: losses by epoch,
    temperatures, ECE before and after, the chosen point and the curve of accuracy over MACs.

    Args:
        model: any model `capture` takes that puts out (batch, classes) logits.
        example_inputs: one call's inputs, batch first; None = taken from the data.
        exits: how many early exits, or the names of the graph nodes they follow.
        data: an object with `train` and `calibration` sets, or one map-style Dataset of (inputs, int label) from which
            15 % is set aside for calibration; label -1 = unlabelled, for training only. None = the exits stay
            untrained and off.
        lr: peak learning rate of the heads.
        freeze_trunk: train the heads only, three times as fast; the final exit stays exactly the static model. Else the
            trained layers learn too, at the peak rate lr * trunk_lr; the final exit may then lose accuracy.
        rule: a name in `runtime.policy.RULES`: max-softmax, entropy, margin, energy, patience or learned.
        threshold_search: "grid", "genetic" or "quota" (`choose_policy`).
        max_loss: accuracy (0..1) that may be lost against the static model, on unseen samples (see `slack`).
        macs: instead, a budget: mean MACs as a share of the static model's.
        risk, confidence, risk_of: instead, a rate promised for unseen samples with that probability (`choose_policy`).
        mixed_precision, device, run_dir, resume, progress: see `trainer.fit`.

    Raises:
        RequestError: wrong arguments or data, no place for the exits, or thresholds that do what is asked do not exist.
        DynCompressError: the training failed.
    """
    leaving: dict[str, Any] = {
        "rule": rule,
        "threshold_search": threshold_search,
        "max_loss": max_loss,
        "macs": macs,
        "risk": risk,
        "confidence": confidence,
        "risk_of": risk_of,
    }
    check_goal(**leaving)
    if trunk_lr <= 0:
        raise RequestError(f"trunk_lr is {trunk_lr}: give a positive share of lr, or freeze the trunk")
    splits = _divided(data, seed) if data is not None else None
    if example_inputs is None:
        if splits is None:
            raise RequestError("give example_inputs, or data to take them from")
        example_inputs = to_device(examples_of(splits[0]), device_of_model(model))
    dynamic = DynamicModel(_with_exits(model, example_inputs, exits, seed)).eval()
    if splits is None:
        warnings.warn(
            "convert without data: the exits are untrained, so all of them are off and every sample runs to the end; "
            "give data=... to train them",
            stacklevel=2,
        )
        return dynamic
    train, calibration = splits
    device = torch.device(device) if device is not None else training_device()
    static_logits = None if freeze_trunk else collect_logits(dynamic, calibration, device=device)[0][-1]
    history = train_exits(
        dynamic,
        train,
        epochs=epochs,
        lr=lr,
        trunk_lr=0.0 if freeze_trunk else trunk_lr,
        batch_size=batch_size,
        seed=seed,
        mixed_precision=mixed_precision,
        device=device,
        run_dir=run_dir,
        resume=resume,
        progress=progress,
    )
    report = choose_policy(
        dynamic,
        calibration,
        **leaving,
        static_logits=static_logits,
        seed=seed,
        device=device,
        progress=progress,
    )
    _note(dynamic, {"history": [asdict(epoch) for epoch in history], **report})
    return dynamic


def train_exits(
    dynamic: DynamicModel, train: LabelledData, *, lr: float, trunk_lr: float, **options: Any
) -> list[Epoch]:
    """Trains all exits in place by self-distillation; `options` are those of `trainer.fit`.

    Args:
        lr: peak learning rate of the heads. trunk_lr: of the rest, as a share of it; 0 = frozen, in eval mode.
    """
    trunk = dynamic.trunk
    heads = [p for name, p in trunk.named_parameters() if name.startswith("exits.")]
    rest = [p for name, p in trunk.named_parameters() if not name.startswith("exits.") and p.requires_grad]
    if trunk_lr > 0:
        groups = [{"params": heads}, {"params": rest, "lr": trunk_lr * lr}]
        return fit(trunk, SelfDistillation(), train, lr=lr, parameters=groups, **options)
    fixed = [module for name, module in trunk.named_children() if name != "exits"]
    for parameter in rest:
        parameter.requires_grad = False
    try:
        return fit(trunk, SelfDistillation(), train, lr=lr, parameters=heads, keep_eval=fixed, **options)
    finally:
        for parameter in rest:
            parameter.requires_grad = True


def _divided(data: HasSplits | LabelledData, seed: int) -> tuple[LabelledData, LabelledData]:
    if isinstance(data, HasSplits):
        size_of(data.calibration, "calibration")
        return data.train, data.calibration
    return split_off(data, _CALIBRATION_SHARE, seed)


def _with_exits(model: nn.Module, example: Inputs, exits: int | Sequence[str], seed: int) -> fx.GraphModule:
    """The captured model with exits, whose weights depend on the seed alone."""
    places = exits if isinstance(exits, int) else tuple(exits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return InsertExits(places)(capture(model, example)).gm


def _note(dynamic: DynamicModel, report: dict[str, Any]) -> None:
    """Into the graph's info, which checkpoints carry."""
    dynamic.trunk.meta["info"] = {**dynamic.trunk.meta.get("info", {}), "convert": report}
