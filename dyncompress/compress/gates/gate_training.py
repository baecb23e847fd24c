"""The phases that gates are trained in: how they decide, their loss, and what moves.

gumbel       gumbel                      noisy decisions                        all
skipnet      supervised, then hybrid     straight, then drawn                   all
blockdrop    curriculum, then joint      drawn, at first for the last gates     the gates, then all
"""

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn

from ...passes.gates.insert_gates import GATES_PATH
from ...passes.gates.read_gates import deciding
from ..options.choices import GateKind
from ..options.training_options import Run, Training
from ..training.batches import LabelledData
from ..training.trainer import Epoch, fit, fixed
from .gate_decisions import Curriculum, Gumbel, Sampled, StraightThrough
from .gate_losses import Budget, Drops, GateLoss, GateRun, Hybrid, MacShares, Rates

GUMBEL, SKIPNET, BLOCKDROP = GATE_KINDS = get_args(GateKind)
_SUPERVISED, _HYBRID, _DRAWN, _CURRICULUM, _JOINT = "supervised", "hybrid", "hybrid alone", "curriculum", "joint"
_TWO = {SKIPNET: (_SUPERVISED, _HYBRID, 0.5), BLOCKDROP: (_CURRICULUM, _JOINT, 0.6)}  # and the first's share of epochs


@dataclass(frozen=True)
class GateTarget:
    """What gates are trained to: a share `macs` of the static model's MACs, or a `rate` of every gate."""

    costs: MacShares
    macs: float | None
    rate: float | None
    distill: float


@dataclass(frozen=True)
class GatePhase:
    """How gates decide, their loss, and whether the model moves with them."""

    decide: nn.Module
    loss: GateLoss
    moves_model: bool = True


def phases_of(kind: str, epochs: int, pretrain: bool) -> list[tuple[str, int]]:
    """Names of phases and their epochs."""
    if kind == GUMBEL:
        return [(GUMBEL, epochs)]
    if not pretrain:
        return [(_DRAWN, epochs)]
    first, second, share = _TWO[kind]
    count = min(epochs - 1, max(1, round(share * epochs)))
    return [(first, count), (second, epochs - count)]


def make_phase(name: str, goal: GateTarget) -> GatePhase:
    """The phase of this name; gates that change on the way follow the progress of its loss."""
    if goal.macs is None:
        assert goal.rate is not None
        rates = Rates(goal.distill, goal.rate)
        return GatePhase(Gumbel(rates), rates)
    budget = (goal.distill, goal.costs, goal.macs)
    if name in (GUMBEL, _SUPERVISED):
        loss = Budget(*budget)
        return GatePhase(Gumbel(loss) if name == GUMBEL else StraightThrough(), loss)
    if name in (_HYBRID, _DRAWN):
        hybrid = Hybrid(*budget, goal.macs if name == _HYBRID else 1.0)
        return GatePhase(Sampled(cooled=hybrid), hybrid)
    drops = Drops(*budget, joint=name == _JOINT)
    if name == _JOINT:
        return GatePhase(Sampled(), drops)
    return GatePhase(Sampled(curriculum=Curriculum(drops, len(goal.costs.branches))), drops, moves_model=False)


def train_gates(
    gm: fx.GraphModule,
    phase: GatePhase,
    teacher: fx.GraphModule | None,
    train: LabelledData,
    training: Training,
    run: Run,
) -> list[Epoch]:
    """Trains a gated graph in place for one phase."""
    gates = [p for name, p in gm.named_parameters() if name.startswith(GATES_PATH)]
    rest = [p for name, p in gm.named_parameters() if not name.startswith(GATES_PATH) and p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": gates}]
    still: list[nn.Module] = []
    if phase.moves_model:
        groups.append({"params": rest, "lr": training.trunk_lr * training.lr})
    else:
        still = [module for name, module in gm.named_modules() if name and not f"{name}.".startswith(GATES_PATH)]
    with fixed([] if phase.moves_model else rest):
        gated = _Gated(gm, phase)
        return fit(gated, phase.loss, train, training, run, parameters=groups, keep_eval=still, teacher=teacher)


class _Gated(nn.Module):
    """Inputs -> `GateRun`."""

    def __init__(self, gm: fx.GraphModule, phase: GatePhase) -> None:
        super().__init__()
        self.decide, self.asks_greedy = phase.decide, isinstance(phase.loss, Drops)
        self.run = deciding(gm, phase.decide)

    def forward(self, *args: Any, **kwargs: Any) -> GateRun:
        (*_, logits), odds, factors = self.run(*args, **kwargs)
        with torch.no_grad():
            greedy = self._greedy(*args, **kwargs) if self.asks_greedy else None
        return GateRun(logits, odds, factors, None, greedy)

    def _greedy(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert isinstance(self.decide, Sampled)
        self.decide.greedy = True
        try:
            (*_, logits), _, factors = self.run(*args, **kwargs)
        finally:
            self.decide.greedy = False
        return logits, factors
