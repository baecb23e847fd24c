"""convert: a trained static network becomes one that answers easy samples early.

1. capture, and insert the exits;
2. train the heads by self-distillation, on a frozen trunk or together with it;
3. calibrate: one temperature per exit;
4. choose the thresholds: the cheapest that keep the static model's accuracy, or the most accurate within a budget.

Steps 3 and 4 see the calibration set only.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from ...errors import RequestError
from ...passes.capture.capture import capture
from ...passes.exits.exit_places import EVERY
from ...passes.exits.insert_exits import InsertExits
from ...passes.graph.inputs import Inputs
from ...runtime.predict.dynamic import DynamicModel
from ..evaluation.exit_quality import measure_exits
from ..options.choices import ExitPlaces, ExitRecipe, Head
from ..options.method_options import Leaving, Samples
from ..options.steps import Convert
from ..options.training_options import Run, Training
from ..synthesis.data_free import COST, check_without_data, splits_of_impressions
from ..synthesis.few_samples import few_shot_training
from ..thresholds.candidates import collect_cached
from ..thresholds.choose_policy import choose_policy
from ..thresholds.goal import Goal
from ..thresholds.risk import check_samples
from ..training.batches import HasSplits, LabelledData, divided, examples_for, size_of
from ..training.machine import training_device
from ..training.trainer import Epoch
from .convert_report import ConvertReport, PerPositionReport
from .recipes import check_recipe, train_exits
from .which_exits import search_exits

SEARCH = "search"


def convert(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    exits: int | ExitPlaces | tuple[str, ...] | list[str] = Convert.exits,
    *,
    data: HasSplits | LabelledData | None = None,
    head: Head = Convert.head,
    recipe: ExitRecipe = Convert.recipe,
    max_loss: float = Convert.max_loss,
    macs: float | None = Convert.macs,
    latency: float | None = Convert.latency,
    freeze_trunk: bool = Convert.freeze_trunk,
    leaving: Leaving = Convert.leaving,
    samples: Samples = Convert.samples,
    training: Training = Convert.training,
    run: Run = Run(),
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
        data: an object with `train` and `calibration` sets, or one map-style Dataset of (inputs, int label) from which
            15 % is set aside for calibration; label -1 = unlabelled, for training only. None = the exits are distilled
            and calibrated on inputs that are synthesised out of the model (`data_free`), which guarantees nothing.
        head, recipe: see `head_choice` and `exits.recipes`.
        max_loss: on unseen samples (see `held_out_loss`), against the static model or, where training the trunk made it
            better, against the final exit.
        freeze_trunk: False: the trained layers learn too, at the peak rate lr * trunk_lr, which takes longer, and the
            final exit may lose accuracy.
        leaving: see `choose_policy`. samples: see `few_samples`.
        The other options are those of `options.steps.Convert`.

    Raises:
        RequestError: wrong arguments or data, no place for the exits, or thresholds that do what is asked do not exist.
        DynCompressError: the training failed.
    """
    asked = Convert(
        exits=tuple(exits) if isinstance(exits, list) else exits, head=head, recipe=recipe, max_loss=max_loss,
        macs=macs, latency=latency, freeze_trunk=freeze_trunk, leaving=leaving, samples=samples, training=training,
    )  # fmt: skip
    leaving = _leaving(asked, data is not None)
    goal = Goal(max_loss=max_loss, macs=macs, latency=latency, leaving=leaving)
    splits = None if data is None else divided(data, run.seed)
    if splits is not None and leaving.risk is not None:
        _check_promise(splits[1], leaving.risk, leaving)
    if example_inputs is None:
        example_inputs = examples_for(model, None if splits is None else splits[0])
    captured = capture(model.trunk if isinstance(model, DynamicModel) else model, example_inputs)
    device = training_device(run.device)
    run, training = replace(run, device=device), asked.training
    if splits is None:
        warnings.warn(COST, stacklevel=2)
        splits = splits_of_impressions(captured, example_inputs, samples.impressions, run, training.mixed_precision)
    train, calibration = splits
    dynamic = DynamicModel(_with_exits(captured, asked, run.seed)).eval()
    if samples.shots is not None:
        train = few_shot_training(train, samples.shots, dynamic, recipe, run.seed)
    static_logits = None if freeze_trunk else _final_logits(dynamic, calibration, device)
    history = train_exits(dynamic, train, recipe, replace(training, trunk_lr=0.0) if freeze_trunk else training, run)
    if dynamic.per_position:
        warnings.warn("the model answers at every position: its exits are trained and measured, but off", stacklevel=2)
        quality = measure_exits(dynamic, calibration, device=device)
        PerPositionReport(history=tuple(history), exits=quality).keep_in(dynamic)
        return dynamic
    return _with_thresholds(dynamic, calibration, exits == SEARCH, goal, static_logits, history, run)


def _with_thresholds(
    dynamic: DynamicModel, calibration: LabelledData, search: bool, goal: Goal, static_logits: Tensor | None,
    history: Sequence[Epoch], run: Run,
) -> DynamicModel:  # fmt: skip
    """The trained model with the exits that pay, where a search is asked for, and with thresholds for the goal."""
    found = None
    if search:
        dynamic, found = search_exits(dynamic, calibration, goal, device=training_device(run.device))
    chosen = choose_policy(
        dynamic, calibration, max_loss=goal.max_loss, macs=goal.macs, latency=goal.latency, leaving=goal.leaving,
        static_logits=static_logits, run=run,
    )  # fmt: skip
    ConvertReport(**vars(chosen), history=tuple(history), exit_search=found).keep_in(dynamic)
    return dynamic


def _leaving(asked: Convert, has_data: bool) -> Leaving:
    """How samples are to leave. Raises RequestError for options that do not go together, or not without data."""
    check_recipe(asked.recipe, asked.freeze_trunk, asked.head)
    if asked.training.trunk_lr <= 0:
        raise RequestError(f"trunk_lr is {asked.training.trunk_lr}: give a positive share of lr, or freeze the trunk")
    if has_data:
        return asked.leaving
    check_without_data(asked)
    return replace(asked.leaving, threshold_search=asked.leaving.threshold_search or "uniform")


def _check_promise(calibration: LabelledData, risk: float, leaving: Leaving) -> None:
    """Better known before the training than after it: whether half of the samples can promise the risk at all."""
    count = size_of(calibration, "calibration")
    with_labels = leaving.risk_of == "accuracy-loss"
    check_samples(count - count // 2, risk, 1 - leaving.confidence, with_labels=with_labels)


def _with_exits(gm: fx.GraphModule, asked: Convert, seed: int) -> fx.GraphModule:
    """The captured model with exits, whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return InsertExits(EVERY if asked.exits == SEARCH else asked.exits, asked.head)(gm).gm


def _final_logits(dynamic: DynamicModel, calibration: LabelledData, device: torch.device) -> Tensor | None:
    """Of the labelled samples, before the trunk is trained; None for a model that answers at every position."""
    return None if dynamic.per_position else collect_cached(dynamic, calibration, device).logits[-1]
