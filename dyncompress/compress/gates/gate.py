"""gate: a trained static network learns which of its residual branches each sample needs, and skips the others.

1. capture, and insert the gates;
2. train them, and with them the network, by one of `GATE_KINDS`;
3. fold the gates' batch norms into the layers before them, so that a gate takes half as long;
4. move all gates' logits by one number, so that the calibration set costs what was asked for;
5. take out the gates that decide alike for nearly all samples there, whose branches run always or leave the model;
6. measure there which branches run, for which classes, and for hard and easy samples (`measure_gates`).
"""

from dataclasses import replace
from functools import partial

import torch
from torch import fx, nn

from ...errors import RequestError
from ...passes.gates.insert_gates import GATES_PATH, POLICY, POOLED, RECURRENT, InsertGates
from ...passes.gates.settle_gates import SettledGates, SettleGates
from ...passes.graph.copying import deep_copy
from ...passes.graph.cost import count_macs
from ...passes.graph.inputs import Inputs
from ...passes.graph.meta import exits_of
from ...passes.rewrites.fold_batch_norm import FoldBatchNorm
from ...runtime.predict.dynamic import DynamicModel
from ..options.choices import GateKind, GateNetwork
from ..options.steps import Gate
from ..options.training_options import Run, Training
from ..training.batches import HasSplits, LabelledData, captured, divided
from ..training.losses import check_share
from ..training.machine import training_device
from ..training.trainer import Epoch, in_phases
from .gate_losses import MacShares
from .gate_report import GateReport, measure_gates, meet_budget, open_rates
from .gate_training import BLOCKDROP, GATE_KINDS, GUMBEL, SKIPNET, GateTarget, make_phase, phases_of, train_gates

_USUAL_GATE = {GUMBEL: POOLED, SKIPNET: RECURRENT, BLOCKDROP: POLICY}


def gate(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    data: HasSplits | LabelledData,
    kind: GateKind = Gate.kind,
    macs: float | None = Gate.macs,
    rate: float | None = Gate.rate,
    gate: GateNetwork | None = Gate.gate,
    distill: float = Gate.distill,
    settle: float = Gate.settle,
    pretrain: bool = Gate.pretrain,
    training: Training = Gate.training,
    run: Run = Run(),
) -> DynamicModel:
    """A copy of `model` that skips, sample by sample, the residual branches it does not need; in eval mode.

    What was measured on the calibration set is in `GateReport.of(result)`; `moved` there is how far the gates' logits
    were moved to meet the budget: by more than one or so where the training was too short to meet it.

    Args:
        model: any model `capture` takes that puts out (batch, classes) logits and has residual branches.
        example_inputs: one call's inputs, batch first; None = taken from the data.
        data: an object with `train` and `calibration` sets, or one map-style Dataset of (inputs, int label) from which
            15 % is set aside for calibration.
        kind: "skipnet" trains half of the epochs supervised and then with policy gradients, "blockdrop" a policy for
            all branches by its curriculum and then jointly with the model; the epochs are those of all phases together.
        settle: in 0..0.5; the branch of a gate that is taken out runs for every sample, or leaves the model. One gate
            always stays.
        The other options are those of `options.steps.Gate`.

    Raises:
        RequestError: wrong arguments or data, no branch that can be skipped, a budget out of reach.
        DynCompressError: the training failed.
    """
    asked = Gate(
        kind=kind, macs=macs, rate=rate, gate=gate, distill=distill, settle=settle, pretrain=pretrain, training=training
    )  # fmt: skip
    _check(asked)
    train, calibration = divided(data, run.seed)
    static = captured(model.trunk if isinstance(model, DynamicModel) else model, example_inputs, train)
    if exits_of(static):
        raise RequestError("the model has exits: gate the static one, then add the exits with convert")
    gm = _with_gates(static, gate or _USUAL_GATE[kind], run.seed)
    dynamic = DynamicModel(gm).eval()
    whole = count_macs(static)
    costs = _costs(dynamic, whole)
    if macs is not None and macs <= costs.fixed:
        raise RequestError(f"macs={macs:g}: what cannot be skipped costs {costs.fixed:.3f} of the model; give more")
    device = training_device(run.device)
    teacher = deep_copy(static).eval() if distill else None
    goal, phases = GateTarget(costs, macs, rate, distill), phases_of(kind, asked.training.epochs, pretrain)

    def trained(phase: str, count: int, part: Run) -> list[Epoch]:
        return train_gates(gm, make_phase(phase, goal), teacher, train, replace(asked.training, epochs=count), part)

    history = in_phases([partial(trained, *phase) for phase in phases], run)
    dynamic = DynamicModel(FoldBatchNorm(GATES_PATH.rstrip("."))(gm.eval()).gm).eval()  # a call less for every gate
    budget = None if macs is None else macs * whole
    dynamic, settled, moved = _settled_on_budget(dynamic, calibration, settle, budget, device)
    use = measure_gates(dynamic, static, calibration, device)
    names = tuple(name for name, _ in phases)
    report = GateReport(**vars(use), moved=moved, settled=settled, kind=kind, phases=names, history=tuple(history))
    report.keep_in(dynamic)
    return dynamic


def _check(asked: Gate) -> None:
    kind, macs, rate, settle, training = asked.kind, asked.macs, asked.rate, asked.settle, asked.training
    if kind not in GATE_KINDS:
        raise RequestError(f"kind={kind!r}: use one of {', '.join(GATE_KINDS)}")
    if (macs is None) == (rate is None):
        raise RequestError("give either macs or rate")
    if rate is not None and kind != GUMBEL:
        raise RequestError(f'rate needs kind="{GUMBEL}": give macs')
    for name, share in {"macs": macs, "rate": rate}.items():
        if share is not None and not 0 < share < 1:
            raise RequestError(f"{name}={share:g}: give a share between 0 and 1")
    check_share(asked.distill)
    if not 0 <= settle < 0.5:
        raise RequestError(f"settle={settle:g}: give a share of the samples below 0.5, such as 0.01")
    if not training.trunk_lr > 0:
        raise RequestError(f"trunk_lr={training.trunk_lr:g}: give a positive share of lr")
    if not asked.pretrain and kind != SKIPNET:
        raise RequestError(f'pretrain goes with kind="{SKIPNET}" only')
    if training.epochs < len(phases_of(kind, 2, asked.pretrain)):
        raise RequestError(f'epochs={training.epochs}: kind="{kind}" trains in two phases; give at least 2')


def _settled_on_budget(
    dynamic: DynamicModel, calibration: LabelledData, settle: float, budget: float | None, device: torch.device
) -> tuple[DynamicModel, SettledGates, float]:
    """Settled, within a budget of mean MACs before and after it; and how far logits were moved for that."""
    moved = 0.0 if budget is None else meet_budget(dynamic, calibration, budget, device)
    dynamic, settled = _settled(dynamic, calibration, settle, device)
    if budget is not None and (settled.always or settled.never):
        moved += meet_budget(dynamic, calibration, budget, device)
    return dynamic, settled, moved


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
