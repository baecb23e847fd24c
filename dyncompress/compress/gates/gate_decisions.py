"""How a gate decides while it learns: its logit l (N,) -> the factor of its branch (N,), differentiable or sampled.

    gumbel     1[l + n > 0], n = log u - log(1 - u);  backwards as sigmoid((l + n) / tau)       (Jang et al. 2017)
    straight   1[l > 0];  backwards as sigmoid(l)                                          (SkipNet, supervised stage)
    sampled    Bernoulli(sigmoid(l / tau)), no gradient through it                 (SkipNet, BlockDrop: policy gradient)

A softmax over two logits with Gumbel noise is a sigmoid of their difference with logistic noise. At evaluation a gate
is open where l > 0, without noise. BlockDrop keeps tau at 1; SkipNet's falls too, or the network would end up trained
for decisions by chance, and be tested on others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..training.hooks import Progress

_COLD = 0.3, 0.1  # tau of the last step, gumbel's and SkipNet's; it falls from 1 geometrically
_MIXED = 0.8  # BlockDrop explores: p <- .8 p + .2 (1 - p)


def gumbel_temperature(progress: Progress) -> float:
    """tau of soft decisions."""
    return _COLD[0] ** progress.fraction


def sampling_temperature(progress: Progress) -> float:
    """tau of SkipNet's drawn decisions."""
    return _COLD[1] ** progress.fraction


class Gumbel(nn.Module):
    """Hard decisions with noise, the gradient of soft ones."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.progress = progress

    def forward(self, logit: Tensor, k: int) -> Tensor:
        uniform = torch.rand_like(logit, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
        noisy = logit + torch.logit(uniform)
        soft = torch.sigmoid(noisy / gumbel_temperature(self.progress))
        return _decided(noisy, soft)


class StraightThrough(nn.Module):
    """The decisions of evaluation, the gradient of soft ones: what learns with them is not surprised by them later."""

    def forward(self, logit: Tensor, k: int) -> Tensor:
        return _decided(logit, torch.sigmoid(logit))


def _decided(logit: Tensor, soft: Tensor) -> Tensor:
    """1[logit > 0] with the gradient of `soft`."""
    return (logit > 0).to(soft.dtype) - soft.detach() + soft


@dataclass(frozen=True)
class Curriculum:
    """BlockDrop's: at first only the last of the gates may close, at three quarters of the phase all may."""

    progress: Progress
    gates: int

    @property
    def forced(self) -> int:
        """How many of the first gates stay open."""
        return max(0, self.gates - 1 - int(self.gates * self.progress.fraction / 0.75))


class Sampled(nn.Module):
    """Decisions drawn at random, or the likelier ones while `greedy`; by a curriculum the first gates stay open.

    cooled: by whose progress the temperature falls; None: it stays at 1, and probabilities are `mixed`.
    """

    def __init__(self, cooled: Progress | None = None, curriculum: Curriculum | None = None) -> None:
        super().__init__()
        self.cooled, self.curriculum, self.greedy = cooled, curriculum, False

    def forward(self, logit: Tensor, k: int) -> Tensor:
        if self.curriculum is not None and k < self.curriculum.forced:
            return torch.ones_like(logit)
        if self.greedy:
            return (logit > 0).to(logit.dtype)
        temperature = 1.0 if self.cooled is None else sampling_temperature(self.cooled)
        return torch.bernoulli(probabilities(logit.detach() / temperature, self.cooled is None)).to(logit.dtype)


def probabilities(logit: Tensor, mixed: bool) -> Tensor:
    """The probability that a gate is drawn open, float32; `mixed`: BlockDrop's, which never comes near 0 or 1."""
    p = torch.sigmoid(logit.float())
    return _MIXED * p + (1 - _MIXED) * (1 - p) if mixed else p


def log_likelihood(logits: Tensor, drawn: Tensor, mixed: bool) -> Tensor:
    """log p(drawn), the shape of `logits`; `drawn` is 0 or 1."""
    p = probabilities(logits, mixed)
    return torch.where(drawn > 0.5, p, 1 - p).clamp_min(1e-8).log()
