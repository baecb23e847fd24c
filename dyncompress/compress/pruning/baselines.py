"""The baselines of structured pruning, as verbs: layers of low rank, and single weights that become zero."""

from torch import fx, nn

from ...passes.graph.inputs import Inputs
from ...passes.rewrites import low_rank as passes
from ..options.choices import WeightScope
from ..options.steps import LowRank, Unstructured
from ..options.training_options import Run, Training
from ..training.batches import HasSplits, LabelledData, captured, training_part
from .after_cut import check_finetune, train_after_cut
from .unstructured import HoldZeros, with_zeros


def low_rank(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    data: HasSplits | LabelledData | None = None,
    energy: float | None = LowRank.energy,
    rank: int | None = LowRank.rank,
    macs: float | None = LowRank.macs,
    params: float | None = LowRank.params,
    finetune: int = LowRank.finetune,
    training: Training = LowRank.training,
    run: Run = Run(),
) -> fx.GraphModule:
    """A copy of `model` whose linear layers and convolutions are two thinner ones each, where that saves MACs.

    With data, BatchNorm statistics are measured anew.

    Args:
        model: any model `capture` takes, or an already captured one (then without `example_inputs`).
        example_inputs: one call's inputs, batch first; None = taken from the data.
        data: map-style, of (inputs, int label), or an object with such a `train` set.
        The options are those of `options.steps.LowRank`.

    Raises:
        RequestError: as the pass `LowRank`; data missing or unfit.
        DynCompressError: the training failed.
    """
    asked = LowRank(energy=energy, rank=rank, macs=macs, params=params, finetune=finetune, training=training)
    check_finetune(finetune, data)
    small = passes.LowRank(energy, rank, macs, params)(captured(model, example_inputs, data)).gm
    train_after_cut(small, training_part(data), finetune, asked.training, run)
    return small


def prune_weights(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    data: HasSplits | LabelledData | None = None,
    sparsity: float = Unstructured.sparsity,
    scope: WeightScope = Unstructured.scope,
    finetune: int = Unstructured.finetune,
    training: Training = Unstructured.training,
    run: Run = Run(),
) -> fx.GraphModule:
    """A copy of `model` in which exactly round(sparsity * n) of the n weights are zero, the smallest in magnitude.

    What was done is in `PruneWeightsReport.of(result)`: the share of zeros of every weight. With data, BatchNorm
    statistics are measured anew; training keeps the zeros.

    Args:
        model: any model `capture` takes, or an already captured one (then without `example_inputs`); see `weights_of`
            for what counts as a weight.
        example_inputs: one call's inputs, batch first; None = taken from the data.
        data: map-style, of (inputs, int label), or an object with such a `train` set.
        The options are those of `options.steps.Unstructured`.

    Raises:
        RequestError: a sparsity out of range, an unknown scope, no weights, or some that are not finite; data missing
            or unfit.
        DynCompressError: the training failed.
    """
    asked = Unstructured(sparsity=sparsity, scope=scope, finetune=finetune, training=training)
    check_finetune(finetune, data)
    zeroed = with_zeros(captured(model, example_inputs, data), sparsity, scope)
    train_after_cut(zeroed, training_part(data), finetune, asked.training, run, hooks=[HoldZeros(zeroed)])
    return zeroed
