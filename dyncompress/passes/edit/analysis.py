"""What is known about a graph as it stands: types, costs, flow, axes, branches, cut points and blocks."""

from dataclasses import dataclass
from functools import cached_property

from torch import fx

from ..axes.axes import Axes
from ..axes.branches import Branch, find_branches
from ..dims.rule_registry import Typing
from ..dims.type_graph import type_graph
from ..graph.cost import node_macs
from .cut_points import Block, CutPoint, blocks, cut_points
from .flow import Flow


@dataclass(frozen=True)
class Analysis:
    """Each part is worked out once, when it is first asked for, and handed on with the rest.

    It speaks of the graph that was typed: whoever changes that graph makes another one.
    """

    types: Typing

    @property
    def gm(self) -> fx.GraphModule:
        """The graph itself."""
        return self.types.gm

    @cached_property
    def macs(self) -> dict[fx.Node, int]:
        """MACs of every node for one sample."""
        return node_macs(self.gm)

    @cached_property
    def total_macs(self) -> int:
        """MACs of one forward pass for one sample."""
        return sum(self.macs.values())

    @cached_property
    def flow(self) -> Flow:
        """What crosses a cut, and how."""
        return Flow(self.types, self.macs)

    @cached_property
    def branches(self) -> list[Branch]:
        """The residual branches that can be removed, in graph order."""
        return find_branches(self.types)

    @cached_property
    def axes(self) -> Axes:
        """The axes of the parameters."""
        return Axes(self.types, self.branches)

    @cached_property
    def cut_points(self) -> list[CutPoint]:
        """All cut points, in graph order."""
        return cut_points(self.flow, self.macs)

    @cached_property
    def blocks(self) -> list[Block]:
        """The stretches between neighbouring single cut points, from the inputs to the last one."""
        return blocks(self.gm.graph, self.cut_points)


def analyse(gm: fx.GraphModule) -> Analysis:
    """Types a captured graph; the rest follows when it is asked for."""
    return Analysis(type_graph(gm))
