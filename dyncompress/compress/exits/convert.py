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
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...errors import RequestError
from ...passes.capture.capture import capture
from ...passes.exits.exit_places import EVERY
from ...passes.exits.insert_exits import InsertExits
from ...passes.graph.inputs import Inputs
from ...runtime.predict.dynamic import DynamicModel
from ...runtime.predict.policy import Fallback
from ..evaluation.exit_quality import measure_exits
from ..synthesis.data_free import COST, check_without_data, splits_of_impressions
from ..synthesis.few_samples import few_shot_training
from ..synthesis.impressions import Synthesis
from ..thresholds.call_costs import Cost
from ..thresholds.candidates import collect_cached
from ..thresholds.choose_policy import choose_policy
from ..thresholds.goal import Goal, RiskKind, SearchKind
from ..thresholds.risk import check_samples
from ..training.batches import HasSplits, LabelledData, device_of_model, divided, examples_of, size_of, to_device
from ..training.machine import training_device
from .convert_report import ConvertReport, PerPositionReport
from .recipes import check_recipe, train_exits
from .which_exits import search_exits

SEARCH = "search"


def convert(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    exits: int | str | Sequence[str] = 3,
    *,
    head: str = "auto",
    data: HasSplits | LabelledData | None = None,
    shots: int | None = None,
    impressions: int = Synthesis.count,
    recipe: str = "distill",
    epochs: int = 4,
    lr: float = 1e-2,
    trunk_lr: float = 0.01,
    batch_size: int = 128,
    freeze_trunk: bool = True,
    rule: str = "max-softmax",
    threshold_search: SearchKind | None = None,
    max_loss: float = 0.005,
    macs: float | None = None,
    latency: float | None = None,
    risk: float | None = None,
    confidence: float = 0.9,
    risk_of: RiskKind = "disagreement",
    cost: Cost | None = None,
    latency_batch: int = 1,
    fallback: Fallback = "final",
    seed: int = 0,
    mixed_precision: str | None = None,
    device: torch.device | str | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> DynamicModel:
    """A dynamic copy of `model`: early exits, trained and calibrated, with thresholds; in eval mode, on its device.

    What was measured on the calibration set is in `ConvertReport.of(result)`: losses by epoch, temperatures, ECE before
    and after, the chosen point and the curve of accuracy over MACs; or in `PerPositionReport.of(result)`.

    Args:
        model: any model `capture` takes that puts out (batch, classes) logits, or one with skip gates, which
            stay. With (batch, time, classes) the exits are trained and measured, but off: the positions of one sample
            would leave at different exits, and those that stay still need the hidden states of those that left.
        example_inputs: one call's inputs, batch first; None = taken from the data.
        exits: how many early exits, or the names of the graph nodes they follow; "every" = after every block;
            "own" = the classifiers that the model has already; "search" = those after every block that pay for
            themselves at the goal (`exit_search`).
        head: a name in `head_choice.HEAD_KINDS`. recipe: one in `exit_recipes.RECIPES`.
        data: an object with `train` and `calibration` sets, or one map-style Dataset of (inputs, int label) from which
            15 % is set aside for calibration; label -1 = unlabelled, for training only. None = the exits are distilled
            and calibrated on inputs that are synthesised out of the model (`data_free`), which guarantees nothing.
        shots: train on this many labelled samples per class, drawn by the seed, instead of all (`few_samples`).
        impressions: without data, how many inputs are synthesised.
        lr: peak learning rate of the heads.
        freeze_trunk: train the heads only, three times as fast; the final exit stays exactly the static model. Else the
            trained layers learn too, at the peak rate lr * trunk_lr; the final exit may then lose accuracy.
        rule: a name in `runtime.policy.RULES`: max-softmax, entropy, margin, energy, patience or learned.
        threshold_search: "grid", "genetic", "quota" or "uniform" (`choose_policy`); None without data: uniform.
        max_loss: accuracy (0..1) that may be lost, on unseen samples (see `slack`), against the static model or, where
            training the trunk made it better, against the final exit.
        macs, latency: instead, a budget: mean MACs, or mean milliseconds, as a share of the static model's.
        risk, confidence, risk_of: instead, a rate promised for unseen samples with that probability (`choose_policy`).
        cost: what thresholds, and the search for exits, are to save: "macs", or "latency" as measured on this device at
            `latency_batch` samples per call; None = what the budget is of, else MACs.
        fallback: who answers samples that no exit is sure of: the "final" exit or the "ensemble" of all.
        mixed_precision, device, run_dir, resume, progress: see `trainer.fit`.

    Raises:
        RequestError: wrong arguments or data, no place for the exits, or thresholds that do what is asked do not exist.
        DynCompressError: the training failed.
    """
    if data is None and threshold_search is None:
        threshold_search = "uniform"
    leaving: dict[str, Any] = {
        "rule": rule, "threshold_search": threshold_search, "max_loss": max_loss, "macs": macs, "latency": latency,
        "risk": risk, "confidence": confidence, "risk_of": risk_of, "cost": cost, "latency_batch": latency_batch,
        "fallback": fallback,
    }  # fmt: skip
    goal = Goal(**leaving)
    check_recipe(recipe, freeze_trunk, head)
    if data is None:
        check_without_data(recipe, freeze_trunk, risk, shots)
    if trunk_lr <= 0:
        raise RequestError(f"trunk_lr is {trunk_lr}: give a positive share of lr, or freeze the trunk")
    splits = None if data is None else divided(data, seed)
    if splits is not None and risk is not None:
        _check_promise(splits[1], risk, confidence, risk_of)
    if example_inputs is None:
        example_inputs = _example(splits, model)
    captured = capture(model.trunk if isinstance(model, DynamicModel) else model, example_inputs)
    device = torch.device(device) if device is not None else training_device()
    run: dict[str, Any] = {
        "seed": seed, "mixed_precision": mixed_precision, "device": device, "run_dir": run_dir, "resume": resume,
        "progress": progress,
    }  # fmt: skip
    if splits is None:
        warnings.warn(COST, stacklevel=2)
        splits = splits_of_impressions(captured, example_inputs, impressions, **run)
    train, calibration = splits
    dynamic = DynamicModel(_with_exits(captured, exits, head, seed)).eval()
    if shots is not None:
        train = few_shot_training(train, shots, dynamic, recipe, seed)
    static_logits = None if freeze_trunk else _final_logits(dynamic, calibration, device)
    history = train_exits(
        dynamic, train, recipe=recipe, epochs=epochs, lr=lr, trunk_lr=0.0 if freeze_trunk else trunk_lr,
        batch_size=batch_size, **run,
    )  # fmt: skip
    if dynamic.per_position:
        warnings.warn("the model answers at every position: its exits are trained and measured, but off", stacklevel=2)
        quality = measure_exits(dynamic, calibration, device=device)
        PerPositionReport(history=tuple(history), exits=quality).keep_in(dynamic)
        return dynamic
    found = None
    if exits == SEARCH:
        dynamic, found = search_exits(dynamic, calibration, goal, device=device)
    policy = {**leaving, "static_logits": static_logits, "seed": seed, "device": device, "progress": progress}
    chosen = choose_policy(dynamic, calibration, **policy)
    ConvertReport(**vars(chosen), history=tuple(history), exit_search=found).keep_in(dynamic)
    return dynamic


def _check_promise(calibration: LabelledData, risk: float, confidence: float, risk_of: RiskKind) -> None:
    """Better known before the training than after it: whether half of the samples can promise the risk at all."""
    count = size_of(calibration, "calibration")
    check_samples(count - count // 2, risk, 1 - confidence, with_labels=risk_of == "accuracy-loss")


def _example(splits: tuple[LabelledData, LabelledData] | None, model: nn.Module) -> Inputs:
    if splits is None:
        raise RequestError("give example_inputs, or data to take them from")
    return to_device(examples_of(splits[0]), device_of_model(model))


def _with_exits(gm: fx.GraphModule, exits: int | str | Sequence[str], head: str, seed: int) -> fx.GraphModule:
    """The captured model with exits, whose weights depend on the seed alone."""
    places = exits if isinstance(exits, int | str) else tuple(exits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return InsertExits(EVERY if places == SEARCH else places, head)(gm).gm


def _final_logits(dynamic: DynamicModel, calibration: LabelledData, device: torch.device) -> Tensor | None:
    """Of the labelled samples, before the trunk is trained; None for a model that answers at every position."""
    return None if dynamic.per_position else collect_cached(dynamic, calibration, device).logits[-1]
