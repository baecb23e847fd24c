"""What runs between two live exits, traced to ONNX: exits that are switched off leave no trace in the file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...errors import DynCompressError
from ...passes.exits.stages import Stage, split_stages
from ...passes.graph.call_structure import nested_output
from ...passes.graph.meta import TensorInput, inputs_of
from ...passes.graph.random_inputs import call_flat
from ..predict.dynamic import DynamicModel
from ..predict.policy import RULES, ExitPolicy, State
from .gates import TracedBranch, trace_branches, use_onnx_branches
from .layer_forms import use_onnx_layers
from .trace import Value, trace

# What a policy with memory hands from one live exit to the next; no node of a graph can have a name with a dot.
_ANSWERS, _SUM = ("exit_rule.answer", "exit_rule.agreed"), "exit_rule.probabilities"
_STATE = (*_ANSWERS, _SUM)
# The input of a segment that holds its exit's threshold, where that is not written into the graph.
THRESHOLD = "exit_rule.threshold"
# What skip gates decided so far, (M, gates) bool; gates to come count as closed.
GATES = "skip_gates.open"


@dataclass(frozen=True)
class Segment:
    """A traced piece of a dynamic model that ends at exit number `exit`.

    `graph` takes the values named `inputs` and gives those named `outputs`, then the logits (M, C) and, but for the
    last segment, bool (M,): who stays. `per_sample` are the values of both that have one row per sample. `threshold` is
    the exit's (the end has none), which the graph takes as the input `THRESHOLD` or holds itself. Of a model with skip
    gates, the operator named as one of the `branches` stands for it; `branch_macs` is what each costs a sample.
    """

    graph: ir.Graph
    exit: int
    inputs: list[str]
    outputs: list[str]
    per_sample: set[str]
    threshold: float | None
    branches: dict[str, TracedBranch]
    branch_macs: tuple[int, ...]


class _Piece(nn.Module):
    """The stages up to a live exit, its head and its rule, as one module of positional tensors."""

    def __init__(
        self, stages: list[Stage], inputs: list[str], fixed: dict[str, Any], policy: ExitPolicy, k: int, gates: "_Gates"
    ) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(s.body for s in stages)
        self.stages, self.inputs, self.fixed, self.policy, self.k, self.gates = stages, inputs, fixed, policy, k, gates
        last = stages[-1]
        self.state = [
            *(_ANSWERS if RULES[policy.rule].remembers else ()),
            *((_SUM,) if policy.fallback == "ensemble" else ()),
        ]
        passed = [n for n in last.outputs if n not in stages[0].inputs]
        self.outputs = [] if last.head is None else [*passed, *self.state]
        self.outputs += [GATES] if gates.count else []

    def forward(self, *given: Value) -> tuple[Value, ...]:
        values: dict[str, Any] = {**self.fixed, **dict(zip(self.inputs, given, strict=True))}
        opened: list[Tensor] = []
        for stage, body in zip(self.stages, self.bodies, strict=True):
            results = body(*(values[n] for n in stage.inputs))
            values.update(zip(stage.outputs, results, strict=False))
            opened += results[len(stage.outputs) :]
        z, head = values[self.stages[-1].at], self.stages[-1].head
        if self.gates.count:
            values[GATES] = self.gates.with_open(values.get(GATES), opened, z)
        state = tuple(values[n] for n in self.state if n in values)
        if head is None:
            return (*(values[n] for n in self.outputs), self.policy.unsure(z, state))
        z = head(z)
        leaves, state = self._decide(z, state, values.get(THRESHOLD))
        values.update(zip(self.state, state, strict=True))
        return (*(values[n] for n in self.outputs), z, ~leaves)

    def _decide(self, z: Tensor, state: State, threshold: Tensor | None) -> tuple[Tensor, State]:
        if threshold is None:
            return self.policy.decide(self.k, z, state)
        score, state = self.policy.score(self.k, z, state)
        return (score >= threshold if RULES[self.policy.rule].high_leaves else score <= threshold), state


@dataclass(frozen=True)
class _Gates:
    """How many skip gates a model has, and how many of them come before a segment."""

    count: int
    before: int

    def with_open(self, known: Tensor | None, opened: list[Tensor], rows: Tensor) -> Tensor:
        """The decisions so far, (M, gates): those `known` before, those of the segment, and False for later ones."""
        found = [] if known is None else [known[:, : self.before]]
        found += [torch.stack(opened, 1)] if opened else []
        left = self.count - self.before - len(opened)
        return torch.cat([*found, rows.new_zeros((rows.shape[0], left), dtype=torch.bool)], 1)


def trace_segments(model: DynamicModel, flat: Sequence[Any], opset: int, tunable: bool) -> list[Segment]:
    """The segments of a dynamic model, early first.

    Args:
        model: in evaluation mode; its image heads and recurrent layers are replaced.
        flat: example values of the graph's inputs, at least two samples.
        tunable: thresholds are inputs.

    Raises:
        DynCompressError: a segment cannot be exported.
    """
    stages = split_stages(model.trunk)  # while the layers can still be typed
    use_onnx_layers(model.trunk)
    values = dict(zip(stages[0].inputs, flat, strict=True))
    dynamic = _free_dims(model.trunk)
    segments: list[Segment] = []
    begin, gates = 0, sum(len(stage.branch_macs) for stage in stages)
    for k, last in enumerate(stages):
        if last.head is not None and not model.policy.is_on(k):
            continue
        if tunable and last.head is not None:
            values[THRESHOLD], dynamic[THRESHOLD] = torch.tensor(model.policy.thresholds[k]), []
        before = sum(len(segment.branch_macs) for segment in segments)
        here = stages[begin : k + 1]
        segments.append(_segment(here, model.policy, k, _Gates(gates, before), values, dynamic, opset))
        begin = k + 1
    return segments


def _segment(
    stages: list[Stage], policy: ExitPolicy, k: int, gates: _Gates,
    values: dict[str, Any], dynamic: dict[str, list[int] | None], opset: int,
) -> Segment:  # fmt: skip
    """Traces the stages up to exit `k`; adds what they give to `values` and `dynamic`."""
    remembered = (_SUM, GATES) if stages[-1].head is None else (*_STATE, THRESHOLD, GATES)
    needed = [*stages[0].inputs, *(n for n in remembered if n in values)]
    inputs = {n: values[n] for n in needed if n in dynamic}
    piece = _Piece(stages, list(inputs), {n: values[n] for n in needed if n not in dynamic}, policy, k, gates)
    gated = [branch for stage in stages for branch in use_onnx_branches(stage.body)]
    traced = trace(piece, inputs, dynamic, opset)
    with torch.no_grad():
        results = piece(*inputs.values())
    for name, value, varies in zip(piece.outputs, results, traced.dynamic, strict=False):
        if not isinstance(value, Tensor | int):
            raise DynCompressError(f"'{name}', a {type(value).__name__}, passes an exit and has no ONNX form")
        values[name], dynamic[name] = _own_memory(value), varies
    last = stages[-1]
    per_sample = {n for n, has_batch in zip(last.outputs, last.per_sample, strict=True) if has_batch} | {*_STATE, GATES}
    threshold = None if last.head is None else policy.thresholds[k]
    branches = trace_branches(gated, traced.program, opset)
    branch_macs = tuple(macs for stage in stages for macs in stage.branch_macs)
    return Segment(traced.graph, k, list(inputs), piece.outputs, per_sample, threshold, branches, branch_macs)


def _own_memory(value: Value) -> Value:
    """torch.export would state facts about the tensor that a view is a view of."""
    return value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value


def _free_dims(gm: fx.GraphModule) -> dict[str, list[int] | None]:
    """By name, the dims of every tensor input that vary."""
    return {given.name: list(given.dynamic) for given in inputs_of(gm) if isinstance(given, TensorInput)}


# --- static models -----------------------------------------------------------------------------------------------


class _Static(nn.Module):
    """A captured graph as a module of positional tensors."""

    def __init__(self, gm: fx.GraphModule, flat: Sequence[Any]) -> None:
        super().__init__()
        self.trunk, self.flat = gm, flat

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        rest = iter(given)
        flat = [next(rest) if isinstance(x, Tensor) else x for x in self.flat]
        return tuple(x for x in pytree.tree_leaves(call_flat(self.trunk, self.trunk, flat)) if isinstance(x, Tensor))


def trace_static(gm: fx.GraphModule, flat: Sequence[Any], opset: int) -> tuple[ir.Graph, list[str]]:
    """The graph of a model without exits, and the names of its outputs.

    Args:
        gm: in evaluation mode; its recurrent layers are replaced.
        flat: example values of the graph's inputs, at least two samples.

    Raises:
        DynCompressError: it cannot be exported.
    """
    names = output_names(gm)
    use_onnx_layers(gm)
    inputs = {given.name: x for given, x in zip(inputs_of(gm), flat, strict=True) if isinstance(x, Tensor)}
    return trace(_Static(gm, flat), inputs, _free_dims(gm), opset).graph, names


def output_names(gm: fx.GraphModule) -> list[str]:
    """A name for each tensor that a graph returns: its key there, else `output_0`, ...; a lone one (N, C): `logits`."""
    names = []
    for path, node in pytree.tree_flatten_with_path(nested_output(gm.graph))[0]:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if not isinstance(value, Tensor):
            continue
        keys = re.findall(r"\w+", pytree.keystr(path))
        lone = "logits" if value.dim() == 2 else "output"
        names.append("_".join(["output", *keys] if keys[:1] and keys[0].isdigit() else keys or [lone]))
    return names
