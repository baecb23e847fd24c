"""Stages: a graph with exits cut into consecutive pieces, each run only on the samples that are still undecided.

What a stage hands to the next is what lives across the cut (see `blocks`). Batch sizes, devices and what only they
and parameters make are made again in each stage from its own first per-sample input. The pieces hold no tensors: they
reach the modules and parameters of the whole graph through their child `trunk`, so that nothing in them goes stale.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn

from ..errors import RequestError
from .blocks import Flow
from .cost import node_macs
from .exits import exit_heads, plain_outputs
from .lift import device_of
from .typing import type_graph

aten = torch.ops.aten


@dataclass(frozen=True)
class Stage:
    """One piece of a graph with exits.

    `body` takes the values named `inputs` (the `outputs` of the stage before; the first: the model's flat inputs) and
    returns the tuple of those named `outputs`. `per_sample[i]` says that dim 0 of `outputs[i]` is the batch. `head`
    reads the output named `at`; the last stage has none, and `at` is its logits. `macs` and `head_macs` are for one
    sample.
    """

    body: fx.GraphModule
    head: nn.Module | None
    at: str
    inputs: list[str]
    outputs: list[str]
    per_sample: list[bool]
    macs: int
    head_macs: int


def without_exits(gm: fx.GraphModule) -> fx.GraphModule:
    """The static graph inside a graph with exits: the user's own call, the final logits; shares all modules of `gm`."""
    heads = set(exit_heads(gm))
    graph = fx.Graph()
    graph.set_codegen(gm.graph._codegen)
    plain_outputs(graph)
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            graph.output(copies[node.args[0][-1]])
        elif node not in heads:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op in {"call_module", "get_attr"}:
                copies[node].target = f"trunk.{node.target}"
    return _body(gm, graph)


def split_stages(gm: fx.GraphModule) -> list[Stage]:
    """The K + 1 stages of a graph with K exits, early first.

    Raises:
        RequestError: the graph has no exits, or an exit where it cannot be cut.
    """
    whole = without_exits(gm)
    flow, macs = Flow(whole, type_graph(whole)), node_macs(whole)
    by_name = {node.name: node for node in whole.graph.nodes}
    nodes = [n for n in whole.graph.nodes if n.op not in {"placeholder", "output"}]
    live = tuple(whole.graph.find_nodes(op="placeholder"))
    stages = []
    for call in exit_heads(gm):
        at = by_name[call.args[0].name]  # type: ignore[union-attr]
        end = nodes.index(at) + 1
        crossing = _crossing(flow, at)
        head = gm.get_submodule(str(call.target))
        stages.append(_stage(gm, flow, macs, live, nodes[:end], crossing, at, head))
        nodes, live = nodes[end:], crossing
    logits = whole.graph.output_node().args[0]
    assert isinstance(logits, fx.Node)
    return [*stages, _stage(gm, flow, macs, live, nodes, (logits,), logits, None)]


def _crossing(flow: Flow, at: fx.Node) -> tuple[fx.Node, ...]:
    live = flow.live_after(at)
    stuck = [n.name for n in live if not flow.crosses(n)]
    if stuck or at not in live:
        reason = f"{', '.join(stuck)} cannot pass on" if stuck else "nothing after it reads it"
        raise RequestError(f"the graph cannot be cut after {at.name}: {reason}; insert the exit elsewhere")
    return live


def _stage(
    gm: fx.GraphModule,
    flow: Flow,
    macs: dict[fx.Node, int],
    inputs: tuple[fx.Node, ...],
    nodes: list[fx.Node],
    outputs: tuple[fx.Node, ...],
    at: fx.Node,
    head: nn.Module | None,
) -> Stage:
    return Stage(
        body=_body(gm, _stage_graph(flow, inputs, nodes, outputs)),
        head=head,
        at=at.name,
        inputs=[n.name for n in inputs],
        outputs=[n.name for n in outputs],
        per_sample=[flow.per_sample(n) for n in outputs],
        macs=sum(macs[n] for n in nodes),
        head_macs=0 if head is None else int(head.macs_per_sample),  # type: ignore[arg-type]
    )


def _stage_graph(flow: Flow, inputs: Iterable[fx.Node], nodes: list[fx.Node], outputs: Iterable[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = _like(node, graph.create_node("placeholder", node.name, name=node.name))
    anchor = next(copies[n] for n in inputs if flow.per_sample(n))

    def fetch(node: fx.Node) -> fx.Node:
        """The stage's own copy of a value; what is remade is made where it is first needed."""
        if node not in copies:
            copies[node] = _remake(graph, node, anchor, fetch)
        return copies[node]

    for node in nodes:
        if node not in flow.remade:
            copies[node] = graph.node_copy(node, fetch)
    graph.output(tuple(copies[n] for n in outputs))
    return graph


def _remake(graph: fx.Graph, node: fx.Node, anchor: fx.Node, fetch: Callable[[fx.Node], fx.Node]) -> fx.Node:
    if node.target is device_of:
        return _like(node, graph.create_node("call_function", device_of, (anchor,), name=node.name))
    if node.target is aten.sym_size.int:
        return _like(node, graph.create_node("call_function", node.target, (anchor, 0), name=node.name))
    return graph.node_copy(node, fetch)


def _like(node: fx.Node, made: fx.Node) -> fx.Node:
    made.meta = dict(node.meta)
    return made


def _body(trunk: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module that runs `graph` on the modules and parameters of `trunk`."""
    body = fx.GraphModule(nn.Module(), fx.Graph())
    body.add_module("trunk", trunk)
    body.graph = graph
    return body
