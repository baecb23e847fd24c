"""The classification loss, per sample or per position, with outputs and labels checked in the user's words; the same
with a teacher."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ...errors import RequestError

IGNORED = -100  # the label of a position that counts for nothing, as in torch's own losses


def cross_entropy(output: Any, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a model's output and int64 labels, over all that are not -100.

    (B, classes) logits take labels (B,); logits per position, (B, T, classes), take labels (B, T).

    Raises:
        RequestError: a label is not one of 0..classes-1, all are -100, or they are no class numbers or do not fit the
            logits' shape.
    """
    logits = logits_of(output)
    check_labels(labels, logits)
    if bool((labels == IGNORED).all()):
        raise RequestError(f"every label of a batch is {IGNORED}, which counts for nothing: leave such samples out")
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


@dataclass(frozen=True)
class Distilled:
    """A loss with a teacher's answers beside the labels (Hinton, Vinyals, Dean, arXiv 1503.02531), of a pair (the
    model's output, the teacher's):

        (1 - share) loss + share * mean T^2 KL(softmax(z_teacher / T) || softmax(z / T))

    over all samples, or positions, whose label is not -100.

    Raises:
        RequestError: the share is not within 0..1.
    """

    loss_fn: Callable[[Any, Tensor], Tensor]
    share: float
    temperature: float = 2.0

    def __post_init__(self) -> None:
        check_share(self.share)

    def __call__(self, output: tuple[Any, Any], labels: Tensor) -> Tensor:
        own, taught = output
        z, z_teacher = logits_of(own), logits_of(taught)
        kl = softened_kl(z_teacher, z, self.temperature)
        if labels.shape == kl.shape:
            kl = kl[labels != IGNORED]
        return (1 - self.share) * self.loss_fn(own, labels) + self.share * kl.mean()


def check_share(distill: float) -> None:
    """Raises RequestError unless a teacher's share of the loss is one."""
    if not 0 <= distill <= 1:
        raise RequestError(f"distill={distill:g}: give a share from 0 to 1")


def softened_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of every row, the teacher detached: (N,)."""
    log_t = F.log_softmax(teacher.detach() / temperature, -1)
    return temperature**2 * (log_t.exp() * (log_t - F.log_softmax(student / temperature, -1))).sum(-1)


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Raises RequestError for labels that are not one whole number, -100 or 0..classes-1, per row of the logits."""
    if labels.shape != logits.shape[:-1] or labels.is_floating_point():
        raise RequestError(
            f"labels must be one class number per sample, or per position, of logits {tuple(logits.shape)}; got "
            f"{labels.dtype} of shape {tuple(labels.shape)}"
        )
    known = labels.where(labels != IGNORED, 0)
    low, high = (int(v) for v in known.aminmax())
    if low < 0 or high >= logits.shape[-1]:
        raise RequestError(
            f"the data holds label {low if low < 0 else high}, but the model puts out {logits.shape[-1]} classes: "
            f"labels must be 0..{logits.shape[-1] - 1}"
        )


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: it itself, what it calls `logits`, or its only (B, classes) tensor.

    Raises:
        RequestError: there is none, or not just one.
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    found = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.dim() == 2 and t.is_floating_point()]
    if len(found) != 1:
        raise RequestError(
            f"the model's output holds {len(found)} tensors of shape (batch, classes), one is needed: "
            "return the logits alone or under the name `logits`"
        )
    return found[0]


UNLABELLED = -1
