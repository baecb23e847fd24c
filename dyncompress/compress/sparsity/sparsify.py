"""Learned structured sparsity: group lasso drives whole groups to zero while the model is trained, and they leave it.

Zeroed groups leave every few epochs and never come back; momentum, moments and learning rates of what is left go on as
they were (PruneTrain: Lym et al., SC 2019, sections 4.1 and 4.2), or the batch grows and the learning rates with it.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ...errors import RequestError
from ...passes.capture.capture import capture
from ...passes.graph.copying import deep_copy
from ...passes.graph.meta import is_captured
from ..pruning.cost_left import one_target
from ..pruning.ranking import Limits
from ..training.batch_growth import GrowBatch
from ..training.batches import LabelledData, device_of_model, examples_of
from ..training.losses import Distilled, cross_entropy
from ..training.recalibrate import recalibrate_batchnorm
from ..training.trainer import LossFunction, Optimizer, fit
from .groups import AXES, LAYERS
from .sparsifier import Request, Sparsifier

RECALIBRATION_BATCHES = 32


def sparsify(
    model: nn.Module,
    data: LabelledData,
    *,
    macs: float | None = None,
    params: float | None = None,
    strength: float | None = None,
    penalty_ratio: float | None = None,
    epochs: int = 10,
    finetune: int = 5,
    shrink_every: int = 2,
    kinds: Sequence[str] = (AXES,),
    floor: float = 0.1,
    round_to: int = 1,
    ignore: Sequence[str] = (),
    ema: float | None = None,
    grow_batch: bool = False,
    distill: float = 0.0,
    loss_fn: LossFunction = cross_entropy,
    optimizer: Optimizer = torch.optim.AdamW,
    lr: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
    mixed_precision: str | None = None,
    device: torch.device | str | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
) -> fx.GraphModule:
    """A physically smaller copy of `model` whose structure was learned: trained with group lasso, then without.

    What was done is in `SparsifyReport.of(result)`: every surgery, the share that group lasso left and that is left
    after what it did not reach was cut, the batch of every epoch, and what is kept of every axis of the original.

    Args:
        model: any model `capture` takes, or an already captured one; trained or not.
        data: map-style, of (inputs, label); labels as `loss_fn` wants them.
        macs, params: the share of multiply-adds or parameters that stays, in (0, 1]: lambda is zero for what pruning
            would keep and takes the rest to zero in time (`strength`). Groups still there after `epochs` are cut.
        strength: instead, lambda by hand. A step takes lr * lambda off the root mean square of each group. With SGD it
            is the factor of the penalty in the loss; Adam's steps do not grow with the loss, and call for .01 to 1.
        penalty_ratio: instead, lambda so that the penalty is this share of the loss at the first step; PruneTrain takes
            .2, with SGD.
        epochs, finetune: with and without group lasso, one learning rate schedule over both.
        shrink_every: epochs between surgeries.
        kinds: of groups: "axes", an axis kind such as "channels", "layers" (residual branches), and others that zero
            weights but take nothing out; see `GroupLasso`.
        floor: least share of each axis that stays.
        round_to: kept counts are multiples of this, at surgeries too: groups that are zero wait for others.
        ignore: module or parameter names whose axes stay whole.
        ema: decay of an average of the weights, such as .999, which the result then has; None = none.
        grow_batch: after every surgery, the batch becomes the largest, in quarters of batch_size, of which a step keeps
            no more for its backward pass than batch_size samples took in the whole model; the learning rate is scaled
            by the same factor, and the average's decay is raised to its power.
        distill: the share of the loss that compares with the answers of the model as it came, 0..1 (`Distilled`).
        loss_fn: (the model's output, labels) -> scalar.
        optimizer: makes one of parameters and lr, such as `partial(torch.optim.SGD, momentum=0.9)`.
        lr, batch_size, mixed_precision, device, run_dir, resume: see `trainer.fit`; an interrupted run resumes to the
            same weights bit for bit.
        progress: a progress bar with live group counts on standard error.

    Raises:
        RequestError: not exactly one of macs, params, strength and penalty_ratio, a target out of reach, unknown kinds
            or ignored names, data missing or unfit.
        DynCompressError: the training failed.
    """
    metric, target = _goal({"macs": macs, "params": params}, {"strength": strength, "penalty_ratio": penalty_ratio})
    loss_fn = Distilled(loss_fn, distill) if distill else loss_fn
    limits = Limits(floor, round_to, tuple(ignore), depth=LAYERS in kinds)
    request = Request(
        metric=metric, target=target, strength=strength, penalty_ratio=penalty_ratio, epochs=epochs, finetune=finetune,
        shrink_every=shrink_every, kinds=tuple(kinds), limits=limits, ema=ema, grow_batch=grow_batch, distill=distill,
    )  # fmt: skip
    gm: Any = deep_copy(model) if is_captured(model) else capture(model, examples_of(data))
    teacher = deep_copy(gm) if distill else None
    work = Sparsifier(gm, request, loss_fn, data)
    options: dict[str, Any] = {"lr": lr, "batch_size": batch_size, "seed": seed, "optimizer": optimizer}
    options |= {"mixed_precision": mixed_precision, "device": device, "run_dir": run_dir, "resume": resume}
    hooks = [work, GrowBatch()] if grow_batch else [work]
    history = fit(
        gm, work.loss, data, epochs=epochs + finetune, hooks=hooks, teacher=teacher, progress=progress, **options
    )
    small = work.finish([epoch.batch_size for epoch in history]).to(device_of_model(gm))
    if ema is not None or (work.learned is not None and not finetune):  # their statistics are not these weights'
        recalibrate_batchnorm(small, data, batches=RECALIBRATION_BATCHES, seed=seed)
    return small


def _goal(targets: dict[str, float | None], by_hand: dict[str, float | None]) -> tuple[str, float | None]:
    """The metric that is counted, and the share of it that stays, if it is given."""
    if sum(value is not None for value in (targets | by_hand).values()) != 1:
        raise RequestError(f"give exactly one of {', '.join(targets | by_hand)}")
    given = any(value is not None for value in targets.values())
    return one_target(targets) if given else (next(iter(targets)), None)
