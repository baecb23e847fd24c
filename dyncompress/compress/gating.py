"""gate: a trained static network learns which of its residual branches each sample needs, and skips the others.

1. capture, and insert the gates;
2. train them, and with them the network, by one of `KINDS`;
3. move all gates' logits by one number, so that the calibration set costs what was asked for;
4. measure there which branches run, for which classes, and for hard and easy samples (`gate_report`).
"""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import RequestError
from ..passes.capture import Inputs, capture
from ..passes.copying import deep_copy
from ..passes.cost import count_macs
from ..passes.gated import deciding
from ..passes.gates import GATES_PATH, POLICY, POOLED, RECURRENT, InsertGates
from ..runtime.dynamic import DynamicModel
from .batches import HasSplits, LabelledData, device_of_model, divided, examples_of, to_device
from .gate_decisions import Gumbel, Progress, Relaxed, Sampled
from .gate_losses import Budget, Costs, Drops, GateLoss, GateRun, Hybrid, Rates
from .gate_report import gate_report, meet_budget
from .losses import logits_of
from .trainer import Epoch, Optimizer, count_steps, fit, fixed, training_device

GUMBEL, SKIPNET, BLOCKDROP = KINDS = ("gumbel", "skipnet", "blockdrop")
_USUAL_GATE = {GUMBEL: POOLED, SKIPNET: RECURRENT, BLOCKDROP: POLICY}
_FIRST_PHASE = {SKIPNET: 0.5, BLOCKDROP: 0.6}  # share of the epochs


def gate(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    data: HasSplits | LabelledData,
    kind: str = GUMBEL,
    gate: str | None = None,
    macs: float | None = None,
    rate: float | None = None,
    distill: float = 0.5,
    pretrain: bool = True,
    epochs: int = 10,
    lr: float = 3e-3,
    trunk_lr: float = 0.3,
    optimizer: Optimizer = torch.optim.AdamW,
    batch_size: int = 128,
    seed: int = 0,
    mixed_precision: str | None = None,
    device: torch.device | str | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> DynamicModel:
    """A copy of `model` that skips, sample by sample, the residual branches it does not need; in eval mode.

    What was measured on the calibration set is in `result.trunk.meta["info"]["gate"]`.

    Args:
        model: any model `capture` takes that puts out (batch, classes) logits and has residual branches.
        example_inputs: one call's inputs, batch first; None = taken from the data.
        data: an object with `train` and `calibration` sets, or one map-style Dataset of (inputs, int label) from which
            15 % is set aside for calibration.
        kind: "gumbel" (ConvNet-AIG), "skipnet" (supervised with relaxed gates, then with policy gradients) or
            "blockdrop" (a policy for all branches, by its curriculum, then jointly with the model).
        gate: a name in `gate_modules`; None: pooled, recurrent and policy for the three kinds.
        macs: the share of the static model's MACs that the mean sample may cost, gates included, in (0, 1).
        rate: instead, with "gumbel", the share of the samples for which each branch runs.
        distill: the share of the loss that compares with the static model's answers, 0..1.
        pretrain: "skipnet": half of the epochs supervised, and then policy gradients; else those alone.
        lr: peak learning rate of the gates; trunk_lr: of the model, as a share of it.
        epochs: all phases together.
        optimizer, mixed_precision, device, run_dir, resume, progress: see `trainer.fit`.

    Raises:
        RequestError: wrong arguments or data, no branch that can be skipped, a budget out of reach.
        DynCompressError: the training failed.
    """
    _check(kind, macs, rate, distill, pretrain, epochs, trunk_lr)
    train, calibration = divided(data, seed)
    if example_inputs is None:
        example_inputs = to_device(examples_of(train), device_of_model(model))
    static = capture(model.trunk if isinstance(model, DynamicModel) else model, example_inputs)
    if static.meta.get("exits"):
        raise RequestError("the model has exits: gate the static one, then add the exits with convert")
    gm = _with_gates(static, gate or _USUAL_GATE[kind], seed)
    dynamic = DynamicModel(gm).eval()
    costs = _costs(dynamic, count_macs(static))
    if macs is not None and macs <= costs.fixed:
        raise RequestError(f"macs={macs:g}: what cannot be skipped costs {costs.fixed:.3f} of the model; give more")
    device = torch.device(device) if device is not None else training_device()
    options: dict[str, Any] = {
        "batch_size": batch_size, "seed": seed, "mixed_precision": mixed_precision, "device": device,
        "optimizer": optimizer, "resume": resume, "progress": progress,
    }  # fmt: skip
    teacher = deep_copy(static).eval() if distill else None
    history: list[Epoch] = []
    phases = _phases(kind, epochs, pretrain)
    for number, (phase, count) in enumerate(phases, start=1):
        folder = run_dir if run_dir is None or len(phases) == 1 else Path(run_dir) / f"phase-{number}"
        work = _PHASES[phase](
            Progress(count_steps(train, count, batch_size)), len(dynamic.gates), costs, macs, rate, distill
        )
        options |= {"run_dir": folder, "epochs": count, "lr": lr}
        made = _train(gm, work, teacher, train, trunk_lr, options)
        history += [replace(epoch, epoch=len(history) + epoch.epoch) for epoch in made]
    if macs is not None:
        meet_budget(dynamic, calibration, macs * count_macs(static), device)
    report = gate_report(dynamic, static, calibration, device)
    report |= {"kind": kind, "phases": [name for name, _ in phases], "history": [asdict(epoch) for epoch in history]}
    gm.meta["info"] = {**gm.meta.get("info", {}), "gate": report}
    return dynamic


def _check(
    kind: str, macs: float | None, rate: float | None, distill: float, pretrain: bool, epochs: int, trunk_lr: float
) -> None:
    if kind not in KINDS:
        raise RequestError(f"kind={kind!r}: use one of {', '.join(KINDS)}")
    if (macs is None) == (rate is None):
        raise RequestError("give either macs or rate")
    if rate is not None and kind != GUMBEL:
        raise RequestError(f'rate needs kind="{GUMBEL}": give macs')
    for name, share in {"macs": macs, "rate": rate}.items():
        if share is not None and not 0 < share < 1:
            raise RequestError(f"{name}={share:g}: give a share between 0 and 1")
    if not 0 <= distill <= 1:
        raise RequestError(f"distill={distill:g}: give a share from 0 to 1")
    if not trunk_lr > 0:
        raise RequestError(f"trunk_lr={trunk_lr:g}: give a positive share of lr")
    if not pretrain and kind != SKIPNET:
        raise RequestError(f'pretrain goes with kind="{SKIPNET}" only')
    if epochs < len(_phases(kind, 2, pretrain)):
        raise RequestError(f'epochs={epochs}: kind="{kind}" trains in two phases; give at least 2')


def _phases(kind: str, epochs: int, pretrain: bool) -> list[tuple[str, int]]:
    """Names of phases and their epochs."""
    if kind == GUMBEL:
        return [(GUMBEL, epochs)]
    if not pretrain:
        return [("hybrid", epochs)]
    first = min(epochs - 1, max(1, round(_FIRST_PHASE[kind] * epochs)))
    names = ("supervised", "hybrid") if kind == SKIPNET else ("curriculum", "joint")
    return [(names[0], first), (names[1], epochs - first)]


def _with_gates(static: fx.GraphModule, gate: str, seed: int) -> fx.GraphModule:
    """The captured model with gates, whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return InsertGates(gate)(static).gm


def _costs(dynamic: DynamicModel, whole: int) -> Costs:
    branches = dynamic.branch_macs
    return Costs((dynamic.static_macs - sum(branches)) / whole, [cost / whole for cost in branches])


# --- phases ------------------------------------------------------------------------------------------------------


class _Work:
    """A phase: how gates decide, their loss, and what follows."""

    def __init__(self, decide: nn.Module, loss: GateLoss, moves_model: bool = True, greedy: bool = False) -> None:
        self.decide, self.loss, self.moves_model, self.greedy = decide, loss, moves_model, greedy

    def before_step(self, step: int) -> None:
        """Nothing."""


class _Curriculum(_Work):
    """BlockDrop's: at first only the last branch may be dropped, at three quarters of the phase all may."""

    def __init__(self, decide: Sampled, loss: Drops, gates: int) -> None:
        super().__init__(decide, loss, moves_model=False, greedy=True)
        self.sampled, self.gates = decide, gates

    def before_step(self, step: int) -> None:
        free = 1 + int(self.gates * self.loss.progress.share / 0.75)
        self.sampled.forced = max(0, self.gates - free)


def _gumbel(done: Progress, gates: int, costs: Costs, macs: float | None, rate: float | None, distill: float) -> _Work:
    if macs is None:
        assert rate is not None
        return _Work(Gumbel(done), Rates(done, distill, rate))
    return _Work(Gumbel(done), Budget(done, distill, costs, macs))


def _supervised(done: Progress, gates: int, costs: Costs, macs: Any, rate: Any, distill: float) -> _Work:
    return _Work(Relaxed(), GateLoss(done, distill))


def _hybrid(done: Progress, gates: int, costs: Costs, macs: Any, rate: Any, distill: float) -> _Work:
    return _Work(Sampled(mixed=False), Hybrid(done, distill, costs, macs))


def _curriculum(done: Progress, gates: int, costs: Costs, macs: Any, rate: Any, distill: float) -> _Work:
    return _Curriculum(Sampled(mixed=True), Drops(done, distill, costs, macs, joint=False), gates)


def _joint(done: Progress, gates: int, costs: Costs, macs: Any, rate: Any, distill: float) -> _Work:
    return _Work(Sampled(mixed=True), Drops(done, distill, costs, macs, joint=True), greedy=True)


_PHASES = {
    GUMBEL: _gumbel, "supervised": _supervised, "hybrid": _hybrid, "curriculum": _curriculum, "joint": _joint,
}  # fmt: skip


class _Training(nn.Module):
    """Inputs -> `GateRun`."""

    def __init__(self, gm: fx.GraphModule, work: _Work, teacher: fx.GraphModule | None) -> None:
        super().__init__()
        self.work = work
        self.run, self.teacher = deciding(gm, work.decide), teacher

    def forward(self, *args: Any, **kwargs: Any) -> GateRun:
        self.work.before_step(self.work.loss.progress.done)
        (*_, logits), odds, factors = self.run(*args, **kwargs)
        with torch.no_grad():
            taught = logits_of(self.teacher(*args, **kwargs)) if self.teacher is not None else None
            greedy = self._greedy(*args, **kwargs) if self.work.greedy else None
        return GateRun(logits, odds, factors, taught, greedy)

    def _greedy(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        decide = self.work.decide
        assert isinstance(decide, Sampled)
        decide.greedy = True
        try:
            out = self.run(*args, **kwargs)
        finally:
            decide.greedy = False
        return out[0][-1], out[2]


def _train(
    gm: fx.GraphModule, work: _Work, teacher: fx.GraphModule | None, train: LabelledData, trunk_lr: float,
    options: dict[str, Any],
) -> list[Epoch]:  # fmt: skip
    gates = [p for name, p in gm.named_parameters() if name.startswith(GATES_PATH)]
    rest = [p for name, p in gm.named_parameters() if not name.startswith(GATES_PATH) and p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": gates}]
    model = _Training(gm, work, teacher)
    still: list[nn.Module] = [] if teacher is None else list(teacher.modules())
    if work.moves_model:
        groups.append({"params": rest, "lr": trunk_lr * options["lr"]})
    else:
        still += [module for name, module in gm.named_modules() if name and not f"{name}.".startswith(GATES_PATH)]
    with fixed([] if work.moves_model else rest):
        return fit(model, work.loss, train, parameters=groups, keep_eval=still, **options)
