"""Cut points, where some samples stop and the others go on, and the blocks between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ..graph.meta import gates_of
from .flow import Flow


@dataclass(frozen=True)
class CutPoint:
    """A place right after `node`, a per-sample tensor that parameters have worked on.

    `live` are all values that cross, in graph order; `single` says that `node` is the only learned per-sample one
    (inputs, masks and what skip gates know may travel along); `macs` per sample are spent up to and including `node`.
    """

    node: fx.Node
    live: tuple[fx.Node, ...]
    single: bool
    macs: int


@dataclass(frozen=True)
class Block:
    """The stretch between two neighbouring single cut points (`start` None: the inputs); `macs` per sample."""

    start: CutPoint | None
    end: CutPoint
    nodes: tuple[fx.Node, ...]
    macs: int


def cut_points(flow: Flow, macs: Mapping[fx.Node, int]) -> list[CutPoint]:
    """All cut points of a graph, in graph order."""
    gm, spent, found = flow.types.gm, 0, []
    for node in gm.graph.nodes:
        spent += macs[node]
        if node in flow.learned and flow.per_sample(node):
            live = flow.live_after(node)
            if node in live and all(map(flow.crosses, live)):
                single = sum(n in flow.learned and flow.per_sample(n) and not _of_gates(gm, n) for n in live) == 1
                found.append(CutPoint(node, live, single, spent))
    return found


def _of_gates(gm: fx.GraphModule, node: fx.Node) -> bool:
    return bool(gates_of(gm)) and node.meta.get("path", "").partition(".")[0] == "gates"


def blocks(graph: fx.Graph, points: Sequence[CutPoint]) -> list[Block]:
    """The stretches between neighbouring single cut points, from the inputs to the last one."""
    order = list(graph.nodes)
    found: list[Block] = []
    start, begin = None, 0
    for point in points:
        if not point.single:
            continue
        end = order.index(point.node, begin) + 1
        spent = start.macs if start else 0
        found.append(Block(start, point, tuple(order[begin:end]), point.macs - spent))
        start, begin = point, end
    return found
