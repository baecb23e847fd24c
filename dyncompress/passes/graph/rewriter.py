"""A graph written from the nodes of another one: copied in order, left out, or replaced on the way."""

from collections.abc import Callable

from torch import fx


class Rewriter:
    """Copies nodes into `graph`; `copies` has what stands there for each node of the other graph.

    Args:
        graph: what is written; copies go to its point of insertion.
        below: the path, in the owner of `graph`, of what the copies call and read by name; "" = the same names.
        missing: makes what a copy needs and `copies` has not.
    """

    def __init__(self, graph: fx.Graph, below: str = "", missing: Callable[[fx.Node], fx.Node] | None = None) -> None:
        self.graph = graph
        self.copies: dict[fx.Node, fx.Node] = {}
        self._prefix, self._missing = f"{below}." if below else "", missing

    def fetch(self, node: fx.Node) -> fx.Node:
        """What stands for `node`."""
        if node not in self.copies and self._missing is not None:
            self.copies[node] = self._missing(node)
        return self.copies[node]

    def copy(self, node: fx.Node) -> fx.Node:
        """Copies a node, its meta data too."""
        made = self.copies[node] = self.graph.node_copy(node, self.fetch)
        if node.op in {"call_module", "get_attr"}:
            made.target = f"{self._prefix}{node.target}"
        return made

    def stand_in(self, node: fx.Node) -> fx.Node:
        """An input of the new graph that stands for a node."""
        made = self.copies[node] = self.graph.create_node("placeholder", node.name, name=node.name)
        made.meta = dict(node.meta)
        return made
