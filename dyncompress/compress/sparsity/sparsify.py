"""Learned structured sparsity: group lasso drives whole groups to zero while the model is trained, and they leave it.

Zeroed groups leave every few epochs and never come back; momentum, moments and learning rates of what is left go on as
they were (PruneTrain: Lym et al., SC 2019, sections 4.1 and 4.2), or the batch grows and the learning rates with it.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import fx, nn

from ...errors import RequestError
from ...passes.graph.copying import deep_copy
from ..options.limits import Limits
from ..options.method_options import Lasso
from ..options.steps import Sparsify
from ..options.training_options import Run, Training
from ..pruning.cost_left import one_target
from ..training.batch_growth import GrowBatch
from ..training.batches import HasSplits, LabelledData, captured, device_of_model, training_part
from ..training.losses import Distilled, cross_entropy
from ..training.recalibrate import RECALIBRATION_BATCHES, recalibrate_batchnorm
from ..training.trainer import LossFunction, fit
from .groups import LAYERS
from .sparsifier import Request, Sparsifier


def sparsify(
    model: nn.Module,
    data: HasSplits | LabelledData,
    *,
    macs: float | None = Sparsify.macs,
    params: float | None = Sparsify.params,
    finetune: int = Sparsify.finetune,
    kinds: Sequence[str] = Sparsify.kinds,
    distill: float = Sparsify.distill,
    loss_fn: LossFunction = cross_entropy,
    lasso: Lasso = Sparsify.lasso,
    limits: Limits = Sparsify.limits,
    training: Training = Sparsify.training,
    run: Run = Run(),
) -> fx.GraphModule:
    """A physically smaller copy of `model` whose structure was learned: trained with group lasso, then without.

    What was done is in `SparsifyReport.of(result)`: every surgery, the share that group lasso left and that is left
    after what it did not reach was cut, the batch of every epoch, and what is kept of every axis of the original. An
    interrupted run resumes to the same weights bit for bit.

    With a share to reach, lambda is zero for what pruning would keep and takes the rest to zero in time
    (`lambda_schedule`); groups still there after the epochs are cut. With a strength, a step takes lr * lambda off the
    root mean square of each group: with SGD it is the factor of the penalty in the loss, while Adam's steps do not grow
    with the loss. A batch that grows becomes, after every surgery, the largest, in quarters of batch_size, of which a
    step keeps no more for its backward pass than batch_size samples took in the whole model; the learning rate is
    scaled by the same factor, and the average's decay is raised to its power. One learning rate schedule runs over the
    epochs with and without group lasso.

    Args:
        model: any model `capture` takes, or an already captured one; trained or not.
        data: map-style, of (inputs, label), labels as `loss_fn` wants them; or an object with such a `train` set.
        loss_fn: (the model's output, labels) -> scalar.
        The other options are those of `options.steps.Sparsify`.

    Raises:
        RequestError: not exactly one of macs, params, strength and penalty_ratio, a target out of reach, unknown kinds
            or ignored names, data missing or unfit.
        DynCompressError: the training failed.
    """
    asked = Sparsify(
        macs=macs, params=params, finetune=finetune, kinds=tuple(kinds), distill=distill, lasso=lasso, limits=limits,
        training=training,
    )  # fmt: skip
    train, epochs = training_part(data), asked.training.epochs
    metric, target = _goal(asked)
    request = Request(
        metric=metric, target=target, epochs=epochs, finetune=finetune, kinds=asked.kinds, lasso=asked.lasso,
        limits=replace(asked.limits, round_to=asked.limits.round_to or 1, depth=LAYERS in kinds), distill=distill,
    )  # fmt: skip
    loss_fn = Distilled(loss_fn, distill) if distill else loss_fn
    gm = captured(model, None, train)
    gm = deep_copy(gm) if gm is model else gm
    teacher = deep_copy(gm) if distill else None
    work = Sparsifier(gm, request, loss_fn, train)
    hooks = [work, GrowBatch()] if asked.lasso.grow_batch else [work]
    whole = replace(asked.training, epochs=epochs + finetune)
    history = fit(gm, work.loss, train, whole, run, hooks=hooks, teacher=teacher)
    small = work.finish([epoch.batch_size for epoch in history]).to(device_of_model(gm))
    if asked.lasso.ema is not None or (work.learned is not None and not finetune):  # their statistics are others'
        recalibrate_batchnorm(small, train, batches=RECALIBRATION_BATCHES, seed=run.seed)
    return small


def _goal(asked: Sparsify) -> tuple[str, float | None]:
    """The metric that is counted, and the share of it that stays, if it is given."""
    targets = {"macs": asked.macs, "params": asked.params}
    by_hand = {"strength": asked.lasso.strength, "penalty_ratio": asked.lasso.penalty_ratio}
    if sum(value is not None for value in (targets | by_hand).values()) != 1:
        raise RequestError(f"give exactly one of {', '.join(targets | by_hand)}")
    given = any(value is not None for value in targets.values())
    return one_target(targets) if given else (next(iter(targets)), None)
