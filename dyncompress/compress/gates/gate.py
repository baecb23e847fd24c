"""gate: a trained static network learns which of its residual branches each sample needs, and skips the others.

1. capture, and insert the gates;
2. train them, and with them the network, by one of `GATE_KINDS`;
3. fold the gates' batch norms into the layers before them, so that a gate takes half as long;
4. move all gates' logits by one number, so that the calibration set costs what was asked for;
5. take out the gates that decide alike for nearly all samples there, whose branches run always or leave the model;
6. measure there which branches run, for which classes, and for hard and easy samples (`measure_gates`).
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ...errors import RequestError
from ...passes.capture.capture import capture
from ...passes.gates.insert_gates import GATES_PATH, POLICY, POOLED, RECURRENT, InsertGates
from ...passes.gates.settle_gates import SettledGates, SettleGates
from ...passes.graph.copying import deep_copy
from ...passes.graph.cost import count_macs
from ...passes.graph.inputs import Inputs
from ...passes.graph.meta import exits_of
from ...passes.rewrites.fold_batch_norm import FoldBatchNorm
from ...runtime.predict.dynamic import DynamicModel
from ..training.batches import HasSplits, LabelledData, device_of_model, divided, examples_of, to_device
from ..training.losses import check_share
from ..training.machine import training_device
from ..training.trainer import Epoch, Optimizer, in_phases
from .gate_losses import MacShares
from .gate_report import GateReport, measure_gates, meet_budget, open_rates
from .gate_training import BLOCKDROP, GATE_KINDS, GUMBEL, SKIPNET, GateTarget, make_phase, phases_of, train_gates

_USUAL_GATE = {GUMBEL: POOLED, SKIPNET: RECURRENT, BLOCKDROP: POLICY}


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
    settle: float = 0.01,
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

    What was measured on the calibration set is in `GateReport.of(result)`; `moved` there is how far the gates' logits
    were moved to meet the budget: by more than one or so where the training was too short to meet it.

    Args:
        model: any model `capture` takes that puts out (batch, classes) logits and has residual branches.
        example_inputs: one call's inputs, batch first; None = taken from the data.
        data: an object with `train` and `calibration` sets, or one map-style Dataset of (inputs, int label) from which
            15 % is set aside for calibration.
        kind: "gumbel" (ConvNet-AIG), "skipnet" (supervised, then with policy gradients) or
            "blockdrop" (a policy for all branches, by its curriculum, then jointly with the model).
        gate: a name in `gate_modules`; None: pooled, recurrent and policy for the three kinds.
        macs: the share of the static model's MACs that the mean sample may cost, gates included, in (0, 1).
        rate: instead, with "gumbel", the share of the samples for which each branch runs.
        distill: the share of the loss that compares with the static model's answers, 0..1.
        pretrain: "skipnet": half of the epochs supervised, and then policy gradients; else those alone.
        settle: a gate that decides alike for all but this share of the calibration samples, 0..0.5, is taken out: its
            branch runs for every sample, or leaves the model. One gate always stays; 0: all do.
        lr: peak learning rate of the gates; trunk_lr: of the model, as a share of it.
        epochs: all phases together.
        optimizer, mixed_precision, device, run_dir, resume, progress: see `trainer.fit`.

    Raises:
        RequestError: wrong arguments or data, no branch that can be skipped, a budget out of reach.
        DynCompressError: the training failed.
    """
    _check(kind, macs, rate, distill, pretrain, settle, epochs, trunk_lr)
    train, calibration = divided(data, seed)
    if example_inputs is None:
        example_inputs = to_device(examples_of(train), device_of_model(model))
    static = capture(model.trunk if isinstance(model, DynamicModel) else model, example_inputs)
    if exits_of(static):
        raise RequestError("the model has exits: gate the static one, then add the exits with convert")
    gm = _with_gates(static, gate or _USUAL_GATE[kind], seed)
    dynamic = DynamicModel(gm).eval()
    whole = count_macs(static)
    costs = _costs(dynamic, whole)
    if macs is not None and macs <= costs.fixed:
        raise RequestError(f"macs={macs:g}: what cannot be skipped costs {costs.fixed:.3f} of the model; give more")
    device = torch.device(device) if device is not None else training_device()
    options: dict[str, Any] = {
        "batch_size": batch_size, "seed": seed, "mixed_precision": mixed_precision, "device": device,
        "optimizer": optimizer, "resume": resume, "progress": progress, "lr": lr,
    }  # fmt: skip
    teacher = deep_copy(static).eval() if distill else None
    goal, phases = GateTarget(costs, macs, rate, distill), phases_of(kind, epochs, pretrain)

    def trained(phase: str, count: int, folder: Path | None) -> list[Epoch]:
        own = {**options, "run_dir": folder, "epochs": count}
        return train_gates(gm, make_phase(phase, goal), teacher, train, trunk_lr, own)

    history = in_phases([partial(trained, *phase) for phase in phases], run_dir)
    dynamic = DynamicModel(FoldBatchNorm(GATES_PATH.rstrip("."))(gm.eval()).gm).eval()  # a call less for every gate
    moved = 0.0 if macs is None else meet_budget(dynamic, calibration, macs * whole, device)
    dynamic, settled = _settled(dynamic, calibration, settle, device)
    if macs is not None and (settled.always or settled.never):
        moved += meet_budget(dynamic, calibration, macs * whole, device)
    use = measure_gates(dynamic, static, calibration, device)
    names = tuple(name for name, _ in phases)
    report = GateReport(**vars(use), moved=moved, settled=settled, kind=kind, phases=names, history=tuple(history))
    report.keep_in(dynamic)
    return dynamic


def _check(
    kind: str, macs: float | None, rate: float | None, distill: float, pretrain: bool, settle: float, epochs: int,
    trunk_lr: float,
) -> None:  # fmt: skip
    if kind not in GATE_KINDS:
        raise RequestError(f"kind={kind!r}: use one of {', '.join(GATE_KINDS)}")
    if (macs is None) == (rate is None):
        raise RequestError("give either macs or rate")
    if rate is not None and kind != GUMBEL:
        raise RequestError(f'rate needs kind="{GUMBEL}": give macs')
    for name, share in {"macs": macs, "rate": rate}.items():
        if share is not None and not 0 < share < 1:
            raise RequestError(f"{name}={share:g}: give a share between 0 and 1")
    check_share(distill)
    if not 0 <= settle < 0.5:
        raise RequestError(f"settle={settle:g}: give a share of the samples below 0.5, such as 0.01")
    if not trunk_lr > 0:
        raise RequestError(f"trunk_lr={trunk_lr:g}: give a positive share of lr")
    if not pretrain and kind != SKIPNET:
        raise RequestError(f'pretrain goes with kind="{SKIPNET}" only')
    if epochs < len(phases_of(kind, 2, pretrain)):
        raise RequestError(f'epochs={epochs}: kind="{kind}" trains in two phases; give at least 2')


def _settled(
    dynamic: DynamicModel, calibration: LabelledData, settle: float, device: torch.device
) -> tuple[DynamicModel, SettledGates]:
    """Without the gates that decide alike, and what became of their branches."""
    if not settle:
        return dynamic, SettledGates((), ())
    rates = dict(zip(dynamic.gates, open_rates(dynamic, calibration, device), strict=True))
    varied = max(rates, key=lambda branch: min(rates[branch], 1 - rates[branch]))
    always = tuple(branch for branch, rate in rates.items() if rate >= 1 - settle and branch != varied)
    never = tuple(branch for branch, rate in rates.items() if rate <= settle and branch != varied)
    result = SettleGates(always, never)(dynamic.trunk)
    return DynamicModel(result.gm).eval(), result.report


def _with_gates(static: fx.GraphModule, gate: str, seed: int) -> fx.GraphModule:
    """The captured model with gates, whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return InsertGates(gate)(static).gm


def _costs(dynamic: DynamicModel, whole: int) -> MacShares:
    branches = dynamic.branch_macs
    return MacShares((dynamic.static_macs - sum(branches)) / whole, [cost / whole for cost in branches])
