"""What follows a cut where there is data: BatchNorm statistics of what is left, and training, if it is asked for."""

from collections.abc import Sequence
from dataclasses import replace

from torch import fx, nn

from ...errors import RequestError
from ..options.training_options import Run, Training
from ..training.batches import LabelledData
from ..training.hooks import Hook
from ..training.losses import cross_entropy
from ..training.recalibrate import RECALIBRATION_BATCHES, recalibrate_batchnorm
from ..training.trainer import LossFunction, fit


def check_finetune(epochs: int, data: object | None) -> None:
    """Raises RequestError for a number of epochs that cannot be, or not without data."""
    if epochs < 0:
        raise RequestError(f"finetune is a number of epochs, 0 or more; got {epochs}")
    if epochs and data is None:
        raise RequestError("finetune needs data: a dataset of (input, label)")


def train_after_cut(
    gm: fx.GraphModule,
    data: LabelledData | None,
    finetune: int,
    training: Training,
    run: Run,
    *,
    loss_fn: LossFunction = cross_entropy,
    teacher: nn.Module | None = None,
    hooks: Sequence[Hook] = (),
) -> None:
    """Trains in place for `finetune` epochs; see `trainer.fit`."""
    if data is None:
        return
    recalibrate_batchnorm(gm, data, batches=RECALIBRATION_BATCHES, seed=run.seed)
    if finetune:
        training = replace(training, epochs=finetune)
        fit(gm, loss_fn, data, training, run, teacher=teacher, hooks=hooks)
