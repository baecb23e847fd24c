"""Stages: a graph with exits cut into consecutive pieces, each run only on the samples that are still undecided.

What a stage hands to the next is what lives across the cut (see `blocks`). Batch sizes, devices and what only they
and parameters make are made again in each stage from its own first per-sample input. The pieces hold no tensors: they
reach the modules and parameters of the whole graph through their child `trunk`, so that nothing in them goes stale.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx, nn

from ...errors import RequestError
from ..edit.analysis import Analysis, analyse
from ..edit.flow import Flow, remake
from ..edit.outputs import all_logits
from ..gates.read_gates import graph_gates
from ..gates.run_gated import Skipping
from ..graph.call_structure import called_like, plain_output
from ..graph.copying import LazyGraphModule
from ..graph.cost import node_macs
from ..graph.meta import gates_of
from ..graph.rewriter import Rewriter
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


@dataclass(frozen=True)
class StagedTrunk:
    """A graph with exits or skip gates, and what it is run as; each part is made once, when it is first asked for.

    Raises:
        RequestError: the graph has neither exits nor skip gates, or an exit where it cannot be cut.
    """

    gm: fx.GraphModule

    @cached_property
    def static(self) -> fx.GraphModule:
        """The graph without its exits: the user's own call, the final logits; shares all modules of `gm`.

        Branches with a skip gate run on the samples that need them.
        """
        shared = self._early == self._heads
        if not self._gated:
            return self._whole.gm if shared else _without(self.gm, self._early)
        known = self._whole if shared else analyse(_without(self.gm, self._early))
        rewriter, branches = Rewriter(called_like(known.gm.graph)), nn.Module()
        skipping = _skipping(self.gm, known)
        for node in known.gm.graph.nodes:
            skipping.copy(rewriter, branches, node)
        return _body(self.gm, rewriter.graph, branches)

    @cached_property
    def static_macs(self) -> int:
        """MACs per sample of `static` with no branch skipped."""
        return sum(macs for node, macs in self._macs.items() if node not in self._early)

    @cached_property
    def stages(self) -> list[Stage]:
        """The K + 1 stages of a graph with K exits, early first."""
        whole, skipping = self._whole, _skipping(self.gm, self._whole)
        by_name = {node.name: node for node in whole.gm.graph.nodes}
        nodes = [n for n in whole.gm.graph.nodes if n.op not in {"placeholder", "output"}]
        live = tuple(whole.gm.graph.find_nodes(op="placeholder"))
        stages = []
        for exit in self._exits:
            at = by_name[exit.at.name]
            end = nodes.index(at) + 1
            crossing = _crossing(whole.flow, at)
            head = exit.module(self.gm) or _body(self.gm, _head_graph(exit))
            stage = _stage(self.gm, skipping, live, nodes[:end], crossing, at)
            stages.append(replace(stage, head=head, head_macs=sum(self._macs[n] for n in exit.nodes)))
            nodes, live = nodes[end:], crossing
        logits = whole.gm.graph.output_node().args[0]
        assert isinstance(logits, fx.Node)
        return [*stages, _stage(self.gm, skipping, live, nodes, (logits,), logits)]

    @property
    def _gated(self) -> bool:
        return bool(gates_of(self.gm))

    @cached_property
    def _exits(self) -> list[Exit]:
        return graph_exits(self.gm)

    @cached_property
    def _heads(self) -> set[fx.Node]:
        return {node for exit in self._exits for node in exit.nodes}

    @cached_property
    def _early(self) -> set[fx.Node]:
        """The heads, and what later exits read of earlier ones."""
        return exit_nodes(self.gm)

    @cached_property
    def _macs(self) -> dict[fx.Node, int]:
        return node_macs(self.gm)

    @cached_property
    def _whole(self) -> Analysis:
        """What the stages are cut out of."""
        return analyse(_without(self.gm, self._heads))


def split_stages(gm: fx.GraphModule) -> list[Stage]:
    """The stages of a graph, see `StagedTrunk`."""
    return StagedTrunk(gm).stages


def _without(gm: fx.GraphModule, dropped: Collection[fx.Node]) -> fx.GraphModule:
    """The final logits of a graph with exits, computed without some nodes that they do not need."""
    rewriter = Rewriter(called_like(gm.graph), below="trunk")
    plain_output(rewriter.graph)
    for node in gm.graph.nodes:
        if node.op == "output":
            rewriter.graph.output(rewriter.copies[all_logits(gm)[-1]])
        elif node not in dropped:
            rewriter.copy(node)
    return _body(gm, rewriter.graph)


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
    rewriter = Rewriter(fx.Graph(), below="trunk")
    rewriter.stand_in(exit.at)
    for node in exit.nodes:
        rewriter.copy(node)
    rewriter.graph.output(rewriter.copies[exit.logits])
    return rewriter.graph


def _skipping(gm: fx.GraphModule, whole: Analysis) -> Skipping:
    """What runs the gated branches of `whole`, which has the nodes of `gm`."""

    def body(inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.GraphModule:
        return _piece(gm, Skipping(whole, [], body), inputs, nodes, outputs)

    return Skipping(whole, graph_gates(gm, whole.gm.graph), body)


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
        per_sample=[skipping.known.flow.per_sample(n) for n in outputs],
        macs=sum(skipping.known.macs[n] for n in nodes),
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
    flow, branches = skipping.known.flow, nn.Module()
    rewriter = Rewriter(fx.Graph(), missing=lambda node: remake(rewriter.graph, node, anchor, rewriter.fetch))
    for node in inputs:
        rewriter.stand_in(node)
    anchor = next(rewriter.copies[n] for n in inputs if flow.per_sample(n))
    for node in nodes:
        if node not in flow.remade:  # what is remade is made where it is first needed
            skipping.copy(rewriter, branches, node)
    rewriter.graph.output(tuple(rewriter.fetch(n) for n in outputs))
    return _body(gm, rewriter.graph, branches)


def with_outputs(gm: fx.GraphModule, nodes: list[fx.Node]) -> fx.GraphModule:
    """A graph with exits that returns (its logits, the values of some nodes); shares all modules of `gm`."""
    rewriter = Rewriter(called_like(gm.graph), below="trunk")
    for node in gm.graph.nodes:
        if node.op == "output":
            both = (all_logits(gm), nodes)
            rewriter.graph.output(tuple(tuple(rewriter.copies[n] for n in values) for values in both))
        else:
            rewriter.copy(node)
    return _body(gm, rewriter.graph)


def _body(trunk: fx.GraphModule, graph: fx.Graph, branches: nn.Module | None = None) -> fx.GraphModule:
    """A module that runs `graph` on the modules and parameters of `trunk`, and on `branches` of its own."""
    body = LazyGraphModule(nn.Module(), fx.Graph())
    body.add_module("trunk", trunk)
    for name, branch in branches.named_children() if branches is not None else ():
        body.add_module(name, branch)
    body.graph = graph
    return body
