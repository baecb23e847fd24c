"""The skip gates of a graph, read off it; and the form of the graph in which gates are trained."""

from dataclasses import dataclass

import torch
from torch import fx, nn

from ..graph.call_structure import called_like
from ..graph.meta import GateNames, gates_of
from ..graph.module_tree import sharing
from ..graph.rewriter import Rewriter
from ..graph.walk import downstream, serving, unread

aten = torch.ops.aten


@dataclass(frozen=True)
class Gate:
    """A skip gate of a graph: `total` = `shortcut` + `end` * `open`; `logit` > 0 is `open`, (batch,).

    `nodes`, in graph order, compute `end` and serve nothing else; `scale` turn `open` into the factor and multiply.
    """

    branch: str
    logit: fx.Node
    open: fx.Node
    scale: tuple[fx.Node, ...]
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    shortcut: fx.Node
    total: fx.Node


def graph_gates(gm: fx.GraphModule, graph: fx.Graph | None = None) -> list[Gate]:
    """The skip gates of a graph, [] without any; `graph`: of one whose nodes have the names of those in `gm`.

    Gates that `graph` has lost (they served an exit only, or come later) are left out.
    """
    graph = graph or gm.graph
    named = {node.name: node for node in graph.nodes}
    order = {node: i for i, node in enumerate(graph.nodes)}
    records = [record for record in gates_of(gm) if record.open in named]
    aside = unread(graph) if records else []
    return [_gate(record, named, order, aside) for record in records]


def _gate(record: GateNames, named: dict[str, fx.Node], order: dict[fx.Node, int], aside: list[fx.Node]) -> Gate:
    opened = named[record.open]
    scale: list[fx.Node] = []
    factor = opened
    while not scale or scale[-1].target is not aten.mul.Tensor:
        (step,) = factor.users
        scale.append(step)
        previous, factor = factor, step
    end = next(n for n in scale[-1].all_input_nodes if n is not previous)
    (total,) = factor.users
    shortcut = next(n for n in total.all_input_nodes if n is not factor)
    region = serving(end, {factor}, aside, order)
    return Gate(record.branch, named[record.logit], opened, tuple(scale), end, tuple(region), shortcut, total)


def inside_gates(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes from the first of a gated branch to the last before its sum: the graph is not to be cut after them."""
    order = list(gm.graph.nodes)
    places = {node: i for i, node in enumerate(order)}
    fed = downstream(gm.graph, gm.graph.find_nodes(op="placeholder"))
    spans = [(min(places[n] for n in gate.nodes if n in fed), places[gate.total]) for gate in graph_gates(gm)]
    return {node for first, last in spans for node in order[first:last]}


def deciding(gm: fx.GraphModule, decide: nn.Module) -> fx.GraphModule:
    """A gated graph whose factors `decide(logit, k)` makes, for training; shares all modules of `gm`.

    It returns (all its logits, the gates' logits (N, G), the factors (N, G)). `decide` becomes its child of that name.
    """
    rewriter = Rewriter(called_like(gm.graph))
    graph, copies = rewriter.graph, rewriter.copies
    gates = graph_gates(gm)
    number = {gate.scale[0]: k for k, gate in enumerate(gates)}
    for node in gm.graph.nodes:
        if node in number:
            args = (copies[gates[number[node]].logit], number[node])
            copies[node] = graph.create_node("call_module", "decide", args)
        elif node.op == "output":
            both = ([copies[g.logit] for g in gates], [copies[g.scale[0]] for g in gates])
            stacked = [graph.call_function(torch.stack, (values, 1)) for values in both]
            graph.output((tuple(copies[n] for n in node.args[0]), *stacked))
        elif not any(node is gate.open for gate in gates):
            rewriter.copy(node)
    owner = sharing(gm)
    owner.add_module("decide", decide)
    return fx.GraphModule(owner, graph)
