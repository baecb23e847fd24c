"""The skip gates of a graph, read off it; and the form of the graph in which gates are trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from ..edit.graft import container
from ..graph.meta import GateNames, gates_of

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
    nodes = list((graph or gm.graph).nodes)
    named = {node.name: node for node in nodes}
    order = {node: i for i, node in enumerate(nodes)}
    records = [record for record in gates_of(gm) if record.open in named]
    unread = _unread(nodes) if records else {}
    return [_gate(record, named, order, unread) for record in records]


def _gate(record: GateNames, named: dict[str, fx.Node], order: dict[fx.Node, int], unread: dict[fx.Node, None]) -> Gate:
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
    region = sorted(_serving(end, factor, unread), key=order.__getitem__)
    return Gate(record.branch, named[record.logit], opened, tuple(scale), end, tuple(region), shortcut, total)


def inside_gates(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes from the first of a gated branch to the last before its sum: the graph is not to be cut after them."""
    order = list(gm.graph.nodes)
    places = {node: i for i, node in enumerate(order)}
    fed = {node for node in order if node.op == "placeholder"}
    for node in order:
        if any(n in fed for n in node.all_input_nodes):
            fed.add(node)
    spans = [(min(places[n] for n in gate.nodes if n in fed), places[gate.total]) for gate in graph_gates(gm)]
    return {node for first, last in spans for node in order[first:last]}


def deciding(gm: fx.GraphModule, decide: nn.Module) -> fx.GraphModule:
    """A gated graph whose factors `decide(logit, k)` makes, for training; shares all modules of `gm`.

    It returns (all its logits, the gates' logits (N, G), the factors (N, G)). `decide` becomes its child of that name.
    """
    graph = fx.Graph()
    graph.set_codegen(gm.graph._codegen)
    copies: dict[fx.Node, fx.Node] = {}
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
            copies[node] = graph.node_copy(node, copies.__getitem__)
    owner = container(gm)
    owner.add_module("decide", decide)
    return fx.GraphModule(owner, graph)


def _serving(end: fx.Node, reader: fx.Node, unread: dict[fx.Node, None]) -> set[fx.Node]:
    """The nodes that only `end`, and through it only `reader`, needs; `unread` calls write to what they are given."""
    found: set[fx.Node] = set()
    outside = {reader, *unread}
    candidates = [end]
    while candidates:
        node = candidates.pop()
        if node.op != "placeholder" and node not in found and (found | outside).issuperset(node.users):
            found.add(node)
            candidates += node.all_input_nodes
    for node in unread:  # in graph order
        if found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def _unread(nodes: Sequence[fx.Node]) -> dict[fx.Node, None]:
    """The nodes that the output is not computed from, in graph order."""
    needed = {nodes[-1]}
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return {node: None for node in nodes if node not in needed}
