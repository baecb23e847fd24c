"""The exits of a graph, read off it again.

Whatever computes the logits of an exit from the node it follows is its head. What only early answers need, the answers
of an earlier exit that a later one reads too, is the exits' part of the graph.
"""

from dataclasses import dataclass

from torch import fx

from ...errors import RequestError
from ..edit.outputs import all_logits
from ..graph.meta import exits_of
from ..graph.walk import upstream
from ..modules.exit_heads import ExitHead


@dataclass(frozen=True)
class Exit:
    """An early exit of a graph: the node it follows, the nodes of its head in graph order, and its logits."""

    at: fx.Node
    nodes: tuple[fx.Node, ...]
    logits: fx.Node

    def module(self, gm: fx.GraphModule) -> ExitHead | None:
        """The head where it is a single module."""
        return _exit_head(gm, self.logits)


def graph_exits(gm: fx.GraphModule) -> list[Exit]:
    """The early exits of a graph, [] without any.

    Raises:
        RequestError: what one of them followed is gone.
    """
    if not exits_of(gm):
        return []
    found = []
    for name, logits in zip(exits_of(gm), all_logits(gm)[:-1], strict=True):
        at = _followed(gm, name, logits)
        nodes = upstream([logits], stop={at})
        found.append(Exit(at, tuple(n for n in gm.graph.nodes if n in nodes), logits))
    return found


def _exit_head(gm: fx.GraphModule, call: fx.Node) -> ExitHead | None:
    module = gm.get_submodule(str(call.target)) if call.op == "call_module" else None
    return module if isinstance(module, ExitHead) else None


def _followed(gm: fx.GraphModule, name: str, logits: fx.Node) -> fx.Node:
    """What the exit with these logits follows: by its name, which a pass may have taken away from a single head's."""
    if _exit_head(gm, logits):
        return logits.all_input_nodes[0]
    found = next((node for node in gm.graph.nodes if node.name == name), None)
    if found is None:
        raise RequestError(f"the node {name}, which an exit followed, is gone: insert the exits after that pass")
    return found


def exit_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes of a graph with exits that its final answer does not need, but an early one does."""
    *early, final = all_logits(gm)
    return upstream(early) - upstream([final])


def exit_modules(gm: fx.GraphModule) -> set[str]:
    """The paths of the modules, parameters and buffers that only early answers need."""
    return {str(n.target) for n in exit_nodes(gm) if n.op in {"call_module", "get_attr"}}


def final_features(gm: fx.GraphModule) -> fx.Node:
    """What the last layer before the final logits of a graph with exits reads."""
    return all_logits(gm)[-1].all_input_nodes[0]
