"""The classification loss, with labels checked in the user's words."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..errors import RequestError
from .evaluate import logits_of


def cross_entropy(output: Any, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a model's output, (B, classes) logits, and labels (B,) int64.

    Raises:
        RequestError: a label is not one of 0..classes-1, or the labels are no class numbers.
    """
    logits = logits_of(output)
    check_labels(labels, logits.shape[-1])
    return F.cross_entropy(logits, labels)


def check_labels(labels: Tensor, classes: int) -> None:
    """Raises RequestError for labels (B,) that are not whole numbers in 0..classes-1."""
    if labels.dim() != 1 or labels.is_floating_point():
        raise RequestError(
            f"labels must be one class number per sample; got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    low, high = (int(v) for v in labels.aminmax())
    if low < 0 or high >= classes:
        raise RequestError(
            f"the data holds label {low if low < 0 else high}, but the model puts out {classes} classes: "
            f"labels must be 0..{classes - 1}"
        )
