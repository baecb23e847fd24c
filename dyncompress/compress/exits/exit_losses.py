"""What exits are trained on, one small class per loss; the last logits are always the model's own answer.

With exits 0..K, logits z_k, p_k = softmax(z_k), label y, averaged over the batch:

    weighted         sum_k w_k CE(y, p_k)                                            (BranchyNet, Shallow-Deep Networks)
    frozen teacher   sum_{k<K} KL(p_k || p_K)                                                                 (FastBERT)
    teachers         CE(y, p_K) + sum_{k<K} [(1-l) CE(y, p_k) + l T^2 KL(q_k^T || p_k^T) + CE(y, q_k)]
    hints            CE(y, p_K) + sum_{k<K} [(1-l) CE(y, p_k) + l T^2 KL(p_K^T || p_k^T)] + c ||F_K - F_k||^2     (BYOT)

with p^T = softmax(z / T), features F and answers q_k of teachers that are removed. In a KL p_K and q_k, and F_K, are
detached. A sample labelled -1 takes part in what
needs no label. Logits at every position, (B, T, classes), are rows of their own; those labelled -100 count for nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import RequestError
from ..training.hooks import ScheduledLoss
from ..training.losses import IGNORED, UNLABELLED, softened_kl


class ExitLoss(ScheduledLoss, ABC):
    """Every exit's logits, early first, and the labels -> a scalar."""

    def __call__(self, output: Sequence[Tensor], labels: Tensor) -> Tensor:
        """output: per exit (B, classes), labels (B,) int64; or (B, T, classes) and (B, T)."""
        logits, labels = rows(output, labels)
        return self.of_rows(logits, labels)

    @abstractmethod
    def of_rows(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        """The same for (N, classes) logits and (N,) labels."""


def rows(output: Sequence[Tensor], labels: Tensor) -> tuple[list[Tensor], Tensor]:
    """Logits (N, classes) and labels (N,): positions as rows of their own, without those labelled -100.

    Raises:
        RequestError: labels of another shape than the logits have rows, or all of them -100.
    """
    if labels.shape != output[-1].shape[:-1]:
        raise RequestError(
            f"logits {tuple(output[-1].shape)} need labels {tuple(output[-1].shape[:-1])}, got {tuple(labels.shape)}"
        )
    if labels.dim() == 1:
        return list(output), labels
    counted = labels != IGNORED
    if not bool(counted.any()):
        raise RequestError(f"every label of a batch is {IGNORED}, which counts for nothing: leave such samples out")
    return [z[counted] for z in output], labels[counted]


def cross_entropies(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """CE of every exit, (N,) each; 0 where there is no label."""
    return [F.cross_entropy(z, labels, ignore_index=UNLABELLED, reduction="none") for z in logits]


class Weighted(ExitLoss):
    """Cross-entropy of every exit by a weight of its own; `weights` one per exit, the last the model's own."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = [float(w) for w in weights]
        self.name = f"cross-entropy by {self.weights}"

    def of_rows(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        each = zip(self.weights, cross_entropies(logits, labels), strict=True)
        return torch.stack([w * ce.mean() for w, ce in each if w]).sum()


class Ramped(ExitLoss):
    """Shallow-Deep Networks' joint training (section 4.2): exit weights that grow, so that the trunk learns first.

    tau_k = min(top_k, start + top_k * share of the training done), the last weight 1.
    """

    def __init__(self, tops: Sequence[float], start: float = 0.01) -> None:
        self.tops, self.start = [float(t) for t in tops], start
        self.name = f"cross-entropy ramped to {self.tops}"

    def weights(self) -> list[float]:
        """The weights of the next step."""
        return [*(min(top, self.start + top * self.fraction) for top in self.tops), 1.0]

    def of_rows(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        each = zip(self.weights(), cross_entropies(logits, labels), strict=True)
        return torch.stack([w * ce.mean() for w, ce in each]).sum()


class FrozenTeacher(ExitLoss):
    """FastBERT's self-distillation (Liu et al., ACL 2020, equations 7 and 8); needs no labels."""

    name = "KL to the last exit"

    def of_rows(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        log_t = F.log_softmax(logits[-1].detach(), -1)
        students = [F.log_softmax(z, -1) for z in logits[:-1]]
        return torch.stack([(s.exp() * (s - log_t)).sum(-1).mean() for s in students]).sum()


class Hints(ExitLoss):
    """Be Your Own Teacher (Zhang et al., ICCV 2019, equation 8): labels, the last exit's answers and its features.

    Its input is (logits, features): of every exit the features (B, D), as the last one has them (see `Hinted`).
    """

    def __init__(self, share: float = 0.5, temperature: float = 3.0, hint: float = 5e-7) -> None:
        self.share, self.temperature, self.hint = share, temperature, hint
        self.name = f"labels, answers at {temperature:g} and hints by {share:g}, {hint:g}"

    def __call__(self, output: Any, labels: Tensor) -> Tensor:
        logits, features = output
        last = features[-1].detach()
        distance = torch.stack([(f - last).square().flatten(1).sum(1).mean() for f in features[:-1]]).sum()
        return super().__call__(logits, labels) + self.hint * distance

    def of_rows(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        *early, last = cross_entropies(logits, labels)
        total = last
        for ce, z in zip(early, logits, strict=False):
            kl = softened_kl(logits[-1], z, self.temperature)
            total = total + (1 - self.share) * ce + self.share * kl
        return total.mean()


class Teachers(ExitLoss):
    """Every early exit has a teacher of its own, which learns from the labels alongside (see `hints.Taught`).

    Its input is (logits of every exit, logits of a teacher per early exit), for answers per sample.
    """

    def __init__(self, share: float = 0.5, temperature: float = 3.0) -> None:
        self.share, self.temperature = share, temperature
        self.name = f"labels and teachers at {temperature:g} by {share:g}"

    def __call__(self, output: Any, labels: Tensor) -> Tensor:
        logits, teachers = output
        return super().__call__([*logits, *teachers], labels)

    def of_rows(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        exits = len(logits) // 2
        ce = cross_entropies(logits, labels)
        total = ce[exits]
        for k, teacher in enumerate(logits[exits + 1 :]):
            kl = softened_kl(teacher, logits[k], self.temperature)
            total = total + (1 - self.share) * ce[k] + self.share * kl + ce[exits + 1 + k]
        return total.mean()
