"""Stages: a graph with exits cut into consecutive pieces, each run only on the samples that are still undecided.

What a stage hands to the next is what lives across the cut (see `blocks`). Batch sizes, devices and what only they
and parameters make are made again in each stage from its own first per-sample input. The pieces hold no tensors: they
reach the modules and parameters of the whole graph through their child `trunk`, so that nothing in them goes stale.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from ...errors import RequestError
from ..dims.type_graph import type_graph
from ..edit.flow import Flow, like, remake
from ..edit.outputs import all_logits, plain_outputs
from ..gates.read_gates import graph_gates
from ..gates.run_gated import Skipping
from ..graph.copying import LazyGraphModule
from ..graph.cost import node_macs
from ..graph.meta import gates_of
from .read_exits import Exit, exit_nodes, graph_exits


@dataclass(frozen=True)
class Stage:
    """One piece of a graph with exits.

    `body` takes the values named `inputs` (the `outputs` of the stage before; the first: the model's flat inputs) and
    returns the tuple of those named `outputs`. `per_sample[i]` says that dim 0 of `outputs[i]` is the batch. `head`
    reads the output named `at`; the last stage has none, and `at` is its logits. `macs` and `head_macs` are for one
    sample. Of a graph with skip gates, `branch_macs` are those of the branches that a stage may skip, which `macs`
    include; its body returns their decisions, (N,) bool each, behind the outputs.
    """

    body: fx.GraphModule
    head: nn.Module | None
    at: str
    inputs: list[str]
    outputs: list[str]
    per_sample: list[bool]
    macs: int
    head_macs: int
    branch_macs: tuple[int, ...]


def without_exits(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph inside a graph with exits: the user's own call, the final logits; shares all modules of `gm`.

    Branches with a skip gate run on the samples that need them.
    """
    whole = _without(gm, exit_nodes(gm))
    skipping = _skipping(gm, whole, Flow(whole, type_graph(whole))) if gates_of(gm) else None
    if skipping is None:
        return whole
    graph, branches = fx.Graph(), nn.Module()
    graph.set_codegen(whole.graph._codegen)
    copies: dict[fx.Node, fx.Node] = {}
    for node in whole.graph.nodes:
        skipping.copy(graph, branches, node, copies, copies.__getitem__)
    return _body(gm, graph, branches)


def _without(gm: fx.GraphModule, dropped: Collection[fx.Node]) -> fx.GraphModule:
    """The final logits of a graph with exits, computed without some nodes that they do not need."""
    graph = fx.Graph()
    graph.set_codegen(gm.graph._codegen)
    plain_outputs(graph)
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            graph.output(copies[all_logits(gm)[-1]])
        elif node not in dropped:
            copies[node] = _copy_into(graph, node, copies)
    return _body(gm, graph)


def split_stages(gm: fx.GraphModule) -> list[Stage]:
    """The K + 1 stages of a graph with K exits, early first.

    Raises:
        RequestError: the graph has neither exits nor skip gates, or an exit where it cannot be cut.
    """
    exits = graph_exits(gm)
    whole = _without(gm, {node for exit in exits for node in exit.nodes})
    flow, head_macs = Flow(whole, type_graph(whole)), node_macs(gm)
    skipping = _skipping(gm, whole, flow)
    by_name = {node.name: node for node in whole.graph.nodes}
    nodes = [n for n in whole.graph.nodes if n.op not in {"placeholder", "output"}]
    live = tuple(whole.graph.find_nodes(op="placeholder"))
    stages = []
    for exit in exits:
        at = by_name[exit.at.name]
        end = nodes.index(at) + 1
        crossing = _crossing(flow, at)
        head = exit.module(gm) or _body(gm, _head_graph(exit))
        stage = _stage(gm, skipping, live, nodes[:end], crossing, at)
        stages.append(replace(stage, head=head, head_macs=sum(head_macs[n] for n in exit.nodes)))
        nodes, live = nodes[end:], crossing
    logits = whole.graph.output_node().args[0]
    assert isinstance(logits, fx.Node)
    return [*stages, _stage(gm, skipping, live, nodes, (logits,), logits)]


def _crossing(flow: Flow, at: fx.Node) -> tuple[fx.Node, ...]:
    """What the stage that ends at `at` hands on, `at` included: its head reads it, even where nothing else does."""
    live = flow.live_after(at)
    stuck = [n.name for n in (*live, at) if not flow.crosses(n)]
    if stuck:
        raise RequestError(
            f"the graph cannot be cut after {at.name}: {', '.join(dict.fromkeys(stuck))} cannot pass on; "
            "insert the exit elsewhere"
        )
    return live if at in live else (*live, at)


def _head_graph(exit: Exit) -> fx.Graph:
    graph = fx.Graph()
    copies = {exit.at: like(exit.at, graph.placeholder(exit.at.name))}
    for node in exit.nodes:
        copies[node] = _copy_into(graph, node, copies)
    graph.output(copies[exit.logits])
    return graph


def _skipping(gm: fx.GraphModule, whole: fx.GraphModule, flow: Flow) -> Skipping:
    """What runs the gated branches of `whole`, which has the nodes of `gm`."""

    def body(inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.GraphModule:
        return _piece(gm, Skipping(whole, [], flow, body, macs), inputs, nodes, outputs)

    macs = node_macs(whole)
    return Skipping(whole, graph_gates(gm, whole.graph), flow, body, macs)


def _stage(
    gm: fx.GraphModule,
    skipping: Skipping,
    inputs: tuple[fx.Node, ...],
    nodes: list[fx.Node],
    outputs: tuple[fx.Node, ...],
    at: fx.Node,
) -> Stage:
    gates = [gate for gate in skipping.gates if gate.total in nodes]
    return Stage(
        body=_piece(gm, skipping, inputs, nodes, (*outputs, *(gate.open for gate in gates))),
        head=None,
        at=at.name,
        inputs=[n.name for n in inputs],
        outputs=[n.name for n in outputs],
        per_sample=[skipping.flow.per_sample(n) for n in outputs],
        macs=sum(skipping.macs[n] for n in nodes),
        head_macs=0,
        branch_macs=tuple(map(skipping.branch_macs, gates)),
    )


def _piece(
    gm: fx.GraphModule,
    skipping: Skipping,
    inputs: Iterable[fx.Node],
    nodes: Iterable[fx.Node],
    outputs: Sequence[fx.Node],
) -> fx.GraphModule:
    graph, branches, flow = fx.Graph(), nn.Module(), skipping.flow
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = like(node, graph.create_node("placeholder", node.name, name=node.name))
    anchor = next(copies[n] for n in inputs if flow.per_sample(n))

    def fetch(node: fx.Node) -> fx.Node:
        """The stage's own copy of a value; what is remade is made where it is first needed."""
        if node not in copies:
            copies[node] = remake(graph, node, anchor, fetch)
        return copies[node]

    for node in nodes:
        if node not in flow.remade:
            skipping.copy(graph, branches, node, copies, fetch)
    graph.output(tuple(fetch(n) for n in outputs))
    return _body(gm, graph, branches)


def with_outputs(gm: fx.GraphModule, nodes: list[fx.Node]) -> fx.GraphModule:
    """A graph with exits that returns (its logits, the values of some nodes); shares all modules of `gm`."""
    graph = fx.Graph()
    graph.set_codegen(gm.graph._codegen)
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            graph.output((tuple(copies[n] for n in all_logits(gm)), tuple(copies[n] for n in nodes)))
        else:
            copies[node] = _copy_into(graph, node, copies)
    return _body(gm, graph)


def _copy_into(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """A copy that finds its module or tensor in the body's child `trunk`."""
    made = graph.node_copy(node, copies.__getitem__)
    if node.op in {"call_module", "get_attr"}:
        made.target = f"trunk.{node.target}"
    return made


def _body(trunk: fx.GraphModule, graph: fx.Graph, branches: nn.Module | None = None) -> fx.GraphModule:
    """A module that runs `graph` on the modules and parameters of `trunk`, and on `branches` of its own."""
    body = LazyGraphModule(nn.Module(), fx.Graph())
    body.add_module("trunk", trunk)
    for name, branch in branches.named_children() if branches is not None else ():
        body.add_module(name, branch)
    body.graph = graph
    return body
