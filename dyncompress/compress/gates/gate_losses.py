"""What skip gates are trained on.

With u the share of the model's MACs that a sample costs, T the target, t annealed from 1 to T over the first half of a
phase (a phase after one that met T begins there), ubar the mean over the batch, and the task's loss CE, or
(1 - C) CE + C KL(static || gated) with the static model as teacher:

    budget        task + w (ubar - t)^2                                       gumbel; skipnet, supervised
    rates         task + 2 mean_l (r - mean_n a_nl)^2                              gumbel, ConvNet-AIG with rate r
    hybrid        task + .01 * policy gradient of  -CE - price * (what later gates cost)                skipnet
    drops         policy gradient of  1 - u^2 where right, else -gamma,  less price * u              blockdrop

with price = 2 w max(0, ubar - t), the slope of the budget's penalty. Advantages: the hybrid's return less the mean of
the other samples' (leave-one-out, so that it stays unbiased), BlockDrop's reward less that of the likelier decisions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..exits.exit_losses import cross_entropies
from ..training.hooks import ScheduledLoss
from ..training.losses import logits_of, softened_kl
from .gate_decisions import log_likelihood, sampling_temperature

_PENALTY = 10.0  # w
_RATE_PENALTY = 2.0
_HYBRID = 0.01
_WRONG = 5.0  # gamma
_ANNEALED = 0.5  # share of a phase


class GateRun(NamedTuple):
    """One training pass: logits (N, C), the gates' logits and factors (N, G), the teacher's logits, and the logits and
    factors of the likelier decisions, where they are asked for."""

    logits: Tensor
    odds: Tensor
    factors: Tensor
    teacher: Tensor | None
    greedy: tuple[Tensor, Tensor] | None


class MacShares:
    """The share of the static model's MACs that a sample costs: `fixed` and `branches` (G,), in those shares."""

    def __init__(self, fixed: float, branches: Sequence[float]) -> None:
        self.fixed, self.branches = fixed, torch.tensor(branches)

    def used(self, factors: Tensor) -> Tensor:
        """(N, G) factors to (N,)."""
        return self.fixed + factors.float() @ self.branches.to(factors.device)


class GateLoss(ScheduledLoss):
    """Base: the task's loss."""

    def __init__(self, distill: float) -> None:
        self.distill = distill
        self.name = f"{type(self).__name__} distilled {distill:g}"

    def __call__(self, output: Any, labels: Tensor) -> Tensor:
        """output: the fields of a `GateRun` without a teacher; where there is one, the pair of them and its output."""
        fields, taught = output if self.distill else (output, None)
        run = GateRun(*fields)
        if taught is not None:
            run = run._replace(teacher=logits_of(taught))
        return self.of_run(run, self.per_sample(run, labels), labels)

    def of_run(self, run: GateRun, task: Tensor, labels: Tensor) -> Tensor:
        """`task` is the task's loss of every sample, (N,)."""
        return task.mean()

    def per_sample(self, run: GateRun, labels: Tensor) -> Tensor:
        """The task's loss of every sample, (N,), with its share of the teacher's answers."""
        (supervised,) = cross_entropies([run.logits], labels)
        if run.teacher is None:
            return supervised
        return (1 - self.distill) * supervised + self.distill * softened_kl(run.teacher, run.logits, 1.0)


class Rates(GateLoss):
    """ConvNet-AIG: every gate is open for a share `rate` of the samples."""

    def __init__(self, distill: float, rate: float) -> None:
        super().__init__(distill)
        self.rate = rate

    def of_run(self, run: GateRun, task: Tensor, labels: Tensor) -> Tensor:
        return task.mean() + _RATE_PENALTY * (self.rate - run.factors.float().mean(0)).square().mean()


class Budget(GateLoss):
    """All gates together cost a share `macs` of the static model."""

    def __init__(self, distill: float, costs: MacShares, macs: float, start: float = 1.0) -> None:
        super().__init__(distill)
        self.costs, self.macs, self.start = costs, macs, start

    @property
    def target(self) -> float:
        """t: it falls from `start` to the target."""
        return self.start - (self.start - self.macs) * min(1.0, self.fraction / _ANNEALED)

    def price(self, used: Tensor) -> Tensor:
        """What one more share of the MACs costs a batch that used these; nothing below the target."""
        return 2 * _PENALTY * (used.mean() - self.target).clamp_min(0).detach()

    def of_run(self, run: GateRun, task: Tensor, labels: Tensor) -> Tensor:
        return task.mean() + _PENALTY * (self.costs.used(run.factors).mean() - self.target).square()


class Hybrid(Budget):
    """SkipNet's second stage (section 3.4): the task's loss with drawn gates, and REINFORCE for the gates."""

    def of_run(self, run: GateRun, task: Tensor, labels: Tensor) -> Tensor:
        drawn = run.factors.detach()
        returns = self.returns(task.detach(), drawn, self.price(self.costs.used(drawn)))
        odds = run.odds / sampling_temperature(self)
        return task.mean() + _HYBRID * reinforce(odds, drawn, without_others(returns), mixed=False)

    def returns(self, task: Tensor, drawn: Tensor, price: Tensor) -> Tensor:
        """(N, G): for each gate minus the loss, and minus the price of what it and the later ones cost."""
        cost = drawn.float() * self.costs.branches.to(drawn.device)
        ahead = cost.flip(1).cumsum(1).flip(1)
        return -task.float()[:, None] - price * ahead


class Drops(Budget):
    """BlockDrop (sections 3.2, 3.3): rewards for cheap right answers; `joint`: the model learns too."""

    def __init__(self, distill: float, costs: MacShares, macs: float, joint: bool) -> None:
        super().__init__(distill, costs, macs)
        self.joint = joint

    def of_run(self, run: GateRun, task: Tensor, labels: Tensor) -> Tensor:
        assert run.greedy is not None
        drawn = run.factors.detach()
        price = self.price(self.costs.used(drawn))
        advantage = self.reward(run.logits, drawn, labels, price) - self.reward(*run.greedy, labels, price)
        policy = reinforce(run.odds, drawn, advantage[:, None].expand_as(drawn), mixed=True)
        return policy + task.mean() if self.joint else policy

    def reward(self, logits: Tensor, factors: Tensor, labels: Tensor, price: Tensor) -> Tensor:
        """(N,)."""
        used = self.costs.used(factors)
        right = logits.argmax(-1) == labels
        return torch.where(right, 1 - used.square(), used.new_tensor(-_WRONG)) - price * used


def reinforce(odds: Tensor, drawn: Tensor, advantage: Tensor, *, mixed: bool) -> Tensor:
    """A scalar with the policy gradient of -advantage: odds, drawn and advantage (N, G), the mean over N.

    Williams 1992. The gradient is that of the expected loss where `advantage` does not depend on the sample's own
    later decisions but through the return.
    """
    return -(log_likelihood(odds, drawn, mixed) * advantage.detach()).sum(1).mean()


def without_others(returns: Tensor) -> Tensor:
    """Each sample's return (N, G) less the mean of the others', which does not depend on what it drew."""
    n = len(returns)
    return returns - (returns.sum(0) - returns) / (n - 1) if n > 1 else returns
