"""Skip gates put into a graph: each residual branch runs on the samples whose gate is open.

In y = a + b, b becomes b * (logit > 0), with one logit per sample computed from what enters the branch. This is the
form that is trained, typed, counted and saved; `gated` has the one that skips.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ...errors import RequestError
from ..axes.branches import Branch
from ..capture.capture import capture
from ..dims.channels import channel_dim
from ..edit.analysis import Analysis, analyse
from ..edit.flow import Flow
from ..edit.graft import inline, insert_head
from ..edit.outputs import find_logits
from ..graph.call_structure import plain_output
from ..graph.cost import count_macs
from ..graph.graph_pass import HAS_GATES, NO_GATES, Condition, GraphPass, PassResult, no_module
from ..graph.meta import GateNames, exits_of, set_gates
from ..graph.module_tree import sharing
from ..modules.gate_modules import ConvGate, Embedding, PolicyNetwork, PooledGate, RecurrentGate

aten = torch.ops.aten
POOLED, FF1, FF2, RECURRENT, POLICY = GATES = ("pooled", "ff1", "ff2", "recurrent", "policy")

GATES_PATH = "gates."  # where the gates' modules and parameters are

_CHEAP = 0.01  # of the model's MACs, for all gates together


@dataclass(frozen=True)
class InsertedGates:
    """The branches that have a gate, why the others have none, and the MACs of all gates as a share of the model's."""

    gates: tuple[str, ...]
    left: dict[str, str]
    share: float


@dataclass(frozen=True)
class InsertGates(GraphPass[InsertedGates]):
    """Adds a skip gate to residual branches: all that can be skipped, or the named ones.

    `gate` is one of `GATES` (`gate_modules`). The gates become the modules ``gates.0``, ``gates.1``, ... (a policy:
    ``gates``); `gates_of` names for each the branch and the nodes of its logit and its decision. The graph's
    output becomes the plain tuple of the logits.

    Raises:
        RequestError: no branch can be skipped, an unknown name, a gate that cannot read what enters a branch.
    """

    name: ClassVar[str] = "insert-gates"
    requires: ClassVar[tuple[Condition, ...]] = (no_module("gates"), NO_GATES)
    ensures: ClassVar[tuple[Condition, ...]] = (HAS_GATES,)
    gate: str = POOLED
    branches: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.branches, list):
            object.__setattr__(self, "branches", tuple(self.branches))
        if self.gate not in GATES:
            raise RequestError(f"gate={self.gate!r}: use one of {', '.join(GATES)}")

    def rewrite(self, gm: fx.GraphModule) -> PassResult[InsertedGates]:
        if not exits_of(gm):
            _answer_alone(gm, find_logits(gm))
        known = analyse(gm)
        chosen, left = self._chosen(known)
        before = known.total_macs
        records = _insert(gm, chosen, self.gate)
        set_gates(gm, records)
        gm.graph.lint()
        gm.recompile()
        spent = count_macs(gm) - before
        if spent > _CHEAP * before:
            warnings.warn(f"the {self.gate} gates cost {spent / before:.1%} of the model's MACs", stacklevel=3)
        return PassResult(gm, True, InsertedGates(tuple(b.branch.name for b in chosen), left, spent / before))

    def _chosen(self, known: Analysis) -> "tuple[list[_Place], dict[str, str]]":
        places, left = gate_places(known)
        if self.branches is not None:
            able = {place.branch.name for place in places}
            for name in self.branches:
                if name not in able:
                    reason = left.get(name, f"those that can be skipped are {', '.join(sorted(able)) or 'none'}")
                    raise RequestError(f"no gate can skip {name!r}: {reason}")
            places = [place for place in places if place.branch.name in self.branches]
        if not places:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
            raise RequestError(f"the model has no residual branch that can be skipped ({reasons or 'no branches'})")
        return places, left


@dataclass(frozen=True)
class _Place:
    """A branch that can be skipped, its last node `end`, and what its gate reads with the dim of the channels there."""

    branch: Branch
    end: fx.Node
    reads: fx.Node
    channel_dim: int


def gate_places(known: Analysis) -> tuple[list[_Place], dict[str, str]]:
    """The innermost branches that can run on some of the samples alone, in graph order; and why others cannot."""
    places: list[_Place] = []
    left: dict[str, str] = {}
    for branch in known.branches:
        costs = any(known.macs[n] for n in branch.nodes)
        found = _place(known.flow, branch) if costs else "it computes next to nothing"
        if isinstance(found, str):
            left[branch.name] = found
        else:
            places.append(found)
    inner = [p for p in places if not any(q is not p and q.branch.total in p.branch.nodes for q in places)]
    left |= {p.branch.name: "a branch inside it can be skipped" for p in places if p not in inner}
    return inner, left


def _place(flow: Flow, branch: Branch) -> _Place | str:
    """Where the gate of a branch goes, or why it has none."""
    end = next(n for n in branch.total.all_input_nodes if n is not branch.shortcut)
    entering = flow.entering(branch.nodes)
    stuck = [n.name for n in (*entering, branch.shortcut) if not flow.crosses(n)]
    if stuck:
        return f"{stuck[0]} cannot be divided by samples"
    if not flow.per_sample(end):
        return f"{end.name} is not one entry per sample"
    if end.meta["val"].dtype != branch.shortcut.meta["val"].dtype:
        return f"{end.name} and {branch.shortcut.name}, which are added, are of different types"
    for node in entering:
        if node in flow.learned and flow.per_sample(node) and node.meta["val"].is_floating_point():
            dim = channel_dim(flow.types, node) if node.meta["val"].dim() > 2 else 1
            if dim:
                return _Place(branch, end, node, dim)
    return "nothing that enters it has features for a gate to read"


# --- writing -----------------------------------------------------------------------------------------------------


def _answer_alone(gm: fx.GraphModule, logits: fx.Node) -> None:
    """Lets the graph return the tuple of its logits, as one with exits does."""
    gm.graph.output_node().args = ((logits,),)
    plain_output(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()


def _insert(gm: fx.GraphModule, places: list[_Place], kind: str) -> list[GateNames]:
    gm.add_submodule("gates", nn.Module())
    logits = _WRITERS[kind](gm, places)
    records = []
    for place, logit in zip(places, logits, strict=True):
        decision = _multiply(gm, place, logit)
        records.append(GateNames(place.branch.name, logit.name, decision.name))
    return records


def _multiply(gm: fx.GraphModule, place: _Place, logit: fx.Node) -> fx.Node:
    """Puts b * (logit > 0) in the place of b; returns the comparison."""
    end, total = place.end, place.branch.total
    val = end.meta["val"]
    steps: list[tuple[Any, tuple[Any, ...]]] = [(aten.gt.Scalar, (0,)), (aten.to.dtype, (val.dtype,))]
    steps += [(aten.unsqueeze.default, (-1,))] * (val.dim() - 1)
    made = [logit]
    with gm.graph.inserting_before(total):
        for target, options in steps:
            node = gm.graph.call_function(target, (made[-1], *options))
            node.meta = {"val": target(made[-1].meta["val"], *options), "path": "gates"}
            made.append(node)
        product = gm.graph.call_function(aten.mul.Tensor, (end, made[-1]))
    product.meta = dict(end.meta)
    total.replace_input_with(end, product)
    return made[1]


def _each(gm: fx.GraphModule, places: list[_Place], make: Callable[[_Place], nn.Module]) -> list[fx.Node]:
    """A gate of its own for each place."""
    return [insert_head(gm, f"gates.{k}", make(p), (p.reads,), p.reads) for k, p in enumerate(places)]


def _pooled(gm: fx.GraphModule, places: list[_Place]) -> list[fx.Node]:
    return _each(gm, places, lambda p: PooledGate(p.reads.meta["val"].shape[p.channel_dim], p.channel_dim))


def _convolutional(layers: int) -> Callable[[fx.GraphModule, list[_Place]], list[fx.Node]]:
    def make(place: _Place) -> nn.Module:
        val = place.reads.meta["val"]
        if val.dim() != 4:
            raise RequestError(
                f'gate="{FF1 if layers == 2 else FF2}" reads an image (batch, channels, height, width); into '
                f"{place.branch.name} goes {('batch', *val.shape[1:])}: use {POOLED}, {RECURRENT} or {POLICY}"
            )
        return ConvGate(val.shape[place.channel_dim], place.channel_dim, _side(val, place.channel_dim), layers)

    return lambda gm, places: _each(gm, places, make)


def _side(val: Tensor, channel_dim: int) -> int:
    """The shorter side of a map."""
    return min([s for d, s in enumerate(val.shape) if d not in (0, channel_dim)], default=1)


def _recurrent(gm: fx.GraphModule, places: list[_Place]) -> list[fx.Node]:
    """A cell that all gates share: its modules are written once, its calls for every gate."""
    reference, cell = next(gm.parameters()), RecurrentGate()
    gm.add_submodule("gates.cell", sharing(cell).to(reference.device, reference.dtype).train(gm.training))
    state: fx.Node | None = None
    logits = []
    for k, place in enumerate(places):
        embed = Embedding(place.reads.meta["val"].shape[place.channel_dim], place.channel_dim)
        x = insert_head(gm, f"gates.{k}", embed, (place.reads,), place.reads)
        inputs = (x,) if state is None else (x, state)
        if k < 2:  # of the first gate, and of all others
            examples = tuple(torch.zeros(2, *n.meta["val"].shape[1:]) for n in inputs)
            taken = capture(cell, examples)
        state = inline(gm, "gates.cell", taken, inputs, _last(gm, inputs))
        with gm.graph.inserting_after(state):
            logit = gm.graph.call_function(aten.select.int, (state, 1, -1))
        logit.meta = {"val": state.meta["val"][:, -1], "path": "gates.cell"}
        logits.append(logit)
    return logits


def _last(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> fx.Node:
    return next(node for node in reversed(gm.graph.nodes) if node in nodes)


def _policy(gm: fx.GraphModule, places: list[_Place]) -> list[fx.Node]:
    first = places[0]
    val, dim = first.reads.meta["val"], first.channel_dim
    network = PolicyNetwork(val.shape[dim], dim, val.dim(), _side(val, dim), len(places))
    del gm._modules["gates"]
    every = end = insert_head(gm, "gates", network, (first.reads,), first.reads)
    logits = []
    for k in range(len(places)):
        with gm.graph.inserting_after(end):
            end = gm.graph.call_function(aten.select.int, (every, 1, k))
        end.meta = {"val": every.meta["val"][:, k], "path": "gates"}
        logits.append(end)
    return logits


_WRITERS: dict[str, Callable[[fx.GraphModule, list[_Place]], list[fx.Node]]] = {
    POOLED: _pooled,
    FF1: _convolutional(2),
    FF2: _convolutional(1),
    RECURRENT: _recurrent,
    POLICY: _policy,
}
