"""Gated branches in ONNX: each runs on the rows whose gate is open, and not at all where none is.

    index = NonZero(open)
    If(index is not empty)  then  Gather the rows `index` of what enters -> branch -> ScatterND adds it to the shortcut
                            else  the shortcut

A stage is traced with one node in the place of each of its branches, and the branches by themselves, all at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.onnx import ops

from ...passes.gates.run_gated import GatedBranch
from .builder import ModelBuilder, Scope
from .trace import Value, trace

_DOMAIN = "dyncompress.gated"
_NODE = torch.ops.onnx_symbolic._symbolic.default  # what `ops.symbolic` leaves in an exported program


@dataclass(frozen=True)
class TracedBranch:
    """The body of a gated branch: `graph` takes what enters it; `per_sample[i]`: input i has one row per sample."""

    graph: ir.Graph
    per_sample: list[bool]


class OnnxBranch(nn.Module):
    """Called like the gated branch it is made from; recorded as one node, whose operator is the branch's name."""

    def __init__(self, name: str, branch: GatedBranch) -> None:
        super().__init__()
        self.name, self.body, self.per_sample = name, branch.body, branch.per_sample

    def forward(self, opened: Tensor, shortcut: Tensor, *entering: Value) -> Tensor:
        """Only the type and shape of the result; its arithmetic exists in ONNX."""
        tensors = [x if isinstance(x, Tensor) else torch.scalar_tensor(x, dtype=torch.int64) for x in entering]
        operator = f"{_DOMAIN}::{self.name}"
        return ops.symbolic(operator, (opened, shortcut, *tensors), dtype=shortcut.dtype, shape=shortcut.shape)


def use_onnx_branches(body: fx.GraphModule) -> list[OnnxBranch]:
    """Replaces, in place, every gated branch of a stage by one that can only be exported; returns these."""
    found = [(name, child) for name, child in body.named_children() if isinstance(child, GatedBranch)]
    made = [OnnxBranch(name, branch) for name, branch in found]
    for branch in made:
        body.set_submodule(branch.name, branch)
    return made


# --- tracing -----------------------------------------------------------------------------------------------------


class _Bodies(nn.Module):
    """The bodies of many branches as one module: what enters each, one after the other, to the results of all."""

    def __init__(self, branches: Sequence[OnnxBranch]) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(branch.body for branch in branches)
        self.counts = [len(branch.per_sample) for branch in branches]

    def forward(self, *given: Value) -> tuple[Tensor, ...]:
        rest = iter(given)
        return tuple(
            body(*[next(rest) for _ in range(count)])[0] for body, count in zip(self.bodies, self.counts, strict=True)
        )


def trace_branches(branches: Sequence[OnnxBranch], program: ExportedProgram, opset: int) -> dict[str, TracedBranch]:
    """The bodies of branches by name; `program` is the stage that calls them.

    One export for all: most of what an export takes does not depend on the size of the graph.

    Raises:
        DynCompressError: one cannot be exported.
    """
    calls = {node.args[1]: node for node in program.graph.find_nodes(op="call_function", target=_NODE)}
    inputs: dict[str, Value] = {}
    dynamic: dict[str, list[int] | None] = {}
    for branch in branches:
        _, _, *entering = calls[branch.name].args[0]
        for made, given in zip(branch.body.graph.find_nodes(op="placeholder"), entering, strict=True):
            name = f"{branch.name}.{made.name}"
            inputs[name], dynamic[name] = _example(made.meta["val"], given.meta["val"])
    if not branches:
        return {}
    graph = trace(_Bodies(branches), inputs, dynamic, opset).graph
    rest = iter(graph.inputs)
    own = [[next(rest) for _ in branch.per_sample] for branch in branches]
    return {
        branch.name: TracedBranch(ir.convenience.extract(graph, given, [result]), branch.per_sample)
        for branch, given, result in zip(branches, own, list(graph.outputs), strict=True)
    }


def _example(captured: Any, given: Tensor) -> tuple[Value, list[int] | None]:
    """A value like what enters a branch, and which of its dims vary; a number that varies is a tensor in the stage."""
    if not isinstance(captured, Tensor):
        return captured, None
    sizes = [size.node.hint if isinstance(size, torch.SymInt) else size for size in given.shape]
    varies = [d for d, size in enumerate(given.shape) if isinstance(size, torch.SymInt)]
    return torch.zeros(sizes, dtype=given.dtype), varies


# --- writing -----------------------------------------------------------------------------------------------------


def skip_branches(
    builder: ModelBuilder, scope: Scope, branches: Mapping[str, TracedBranch], results: Sequence[ir.Value], prefix: str
) -> list[ir.Value]:
    """Puts an If in the place of each node of `scope` that stands for a branch; returns `results`, as they then are."""
    nodes, scope.nodes = scope.nodes, []
    instead: dict[int, ir.Value] = {}
    for node in nodes:
        if node.domain != _DOMAIN:
            scope.nodes.append(node)
            continue
        (old,) = node.outputs
        instead[id(old)] = made = _skip(builder, scope, node, branches[node.op_type], f"{prefix}/{node.op_type}")
        made.shape = old.shape
        old.replace_all_uses_with(made)
    return [instead.get(id(value), value) for value in results]


def _skip(builder: ModelBuilder, scope: Scope, node: ir.Node, branch: TracedBranch, prefix: str) -> ir.Value:
    opened, shortcut, *entering = [value for value in node.inputs if value is not None]
    index, anyone = builder.rows_where(opened, scope, prefix)
    inner, closed = Scope(scope), Scope(scope)
    given = [
        inner.op("Gather", [value, index], f"{prefix}/in/{i}", {"axis": 0}, like=value) if own else value
        for i, (value, own) in enumerate(zip(entering, branch.per_sample, strict=True))
    ]
    (added,) = builder.inline(branch.graph, given, inner, prefix)
    rows = inner.op("Unsqueeze", [index, builder.constant("axis_1", [1])], f"{prefix}/rows")
    total = inner.op("ScatterND", [shortcut, rows, added], f"{prefix}/open/out", {"reduction": "add"}, like=shortcut)
    same = closed.op("Identity", [shortcut], f"{prefix}/closed/out", like=shortcut)
    either = inner.graph([total], f"{prefix}/open"), closed.graph([same], f"{prefix}/closed")
    return scope.either(anyone, *either, f"{prefix}/if", [str(node.outputs[0].name)])[0]
