"""Importances that ask the loss L (mean cross-entropy over samples). With w_i everything that belongs to index i:

    taylor(i)  = | sum <w_i, dL/dw_i> |      first order     (Molchanov et al., CVPR 2019)
    hessian(i) = 1/2 sum w_i^2 h_i           second order    (optimal brain damage: LeCun et al., 1990)

where h, the diagonal of the empirical Fisher, stands in for the Hessian's: the mean over samples n of (dL_n/dw)^2.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx
from tqdm import tqdm

from ...errors import RequestError
from ...passes.axes.axes import Axis
from ..training.batches import LabelledData, call, device_of_model, in_order, placed, size_of
from ..training.losses import cross_entropy
from .group_sums import Context, Scores, group_sums

FISHER_SAMPLES = 128  # one backward pass each


def taylor_scores(gm: fx.GraphModule, axes: Iterable[Axis], context: Context) -> Scores:
    """First-order estimate of how much the loss would change without each group, by axis name.

    Raises:
        RequestError: no data, labels of one class only or out of range.
    """
    with _gradients(gm):
        for _ in _backward(gm, context.drawn(), context.batch_size, context.progress):
            pass  # the gradients add up
        return {name: sums.abs() for name, sums in group_sums(gm, axes, torch.mul, _with_gradient).items()}


def hessian_scores(gm: fx.GraphModule, axes: Iterable[Axis], context: Context) -> Scores:
    """Second-order estimate of how much the loss would grow without each group, by axis name.

    At most 128 samples are looked at: each takes a backward pass of its own.

    Raises:
        RequestError: as for Taylor.
    """
    data = context.drawn(FISHER_SAMPLES)
    count = size_of(data, "importance")
    fisher: dict[int, Tensor] = {}
    with _gradients(gm):
        for _ in _backward(gm, data, 1, context.progress):
            for p in gm.parameters():
                if p.grad is not None:
                    square = (p.grad.double() * count).square() / count  # the loss of one sample was divided by count
                    fisher[id(p)] = fisher[id(p)] + square if id(p) in fisher else square
                    p.grad = None

    def with_fisher(weight: Tensor) -> tuple[Tensor, ...]:
        return (weight, fisher[id(weight)]) if id(weight) in fisher else ()

    return group_sums(gm, axes, _saliency, with_fisher)


def _saliency(weight: Tensor, fisher: Tensor) -> Tensor:
    return 0.5 * weight.square() * fisher


def _with_gradient(weight: Tensor) -> tuple[Tensor, ...]:
    return () if weight.grad is None else (weight, weight.grad)


def _backward(gm: fx.GraphModule, data: LabelledData, batch_size: int, progress: bool) -> Iterator[None]:
    """Adds each batch's share of the gradient of the mean loss to the parameters' `grad`; pauses after each batch."""
    count, device = size_of(data, "importance"), device_of_model(gm)
    classes: set[int] = set()
    with tqdm(total=count, desc="importance", unit="sample", leave=False, disable=not progress) as bar:
        for inputs, labels in in_order(data, batch_size, device):
            loss = cross_entropy(call(gm, inputs), labels)
            classes.update(labels.tolist())
            (loss * (len(labels) / count)).backward()
            bar.update(len(labels))
            yield
    if len(classes) < 2:
        raise RequestError(
            f"all {count} samples drawn have label {classes.pop()}: ranking by the loss needs two classes or more"
        )


@contextmanager
def _gradients(gm: fx.GraphModule) -> Iterator[None]:
    """Evaluation mode with fresh gradients for every parameter, frozen ones too; everything as it was afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in gm.parameters()]
    try:
        # cuDNN's recurrent layers have no backward pass in evaluation mode
        with placed(gm, device_of_model(gm)), torch.backends.cudnn.flags(enabled=False), torch.enable_grad():
            gm.eval()
            for p, _, _ in before:
                p.requires_grad_(p.is_floating_point())
                p.grad = None
            yield
    finally:
        for p, required, gradient in before:
            p.requires_grad_(required)
            p.grad = gradient
