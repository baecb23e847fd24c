"""What the indices of an axis are, in the field's words. Rules say it where they know; the first of AXIS_KINDS
wins.

Heads and head dims are what attention broadcasts over and contracts; the residual width is what residual sums carry.
Hidden states are what a recurrent layer keeps, or, in a loop that capture unrolled, what a layer computes and reads
again in a later call.
"""

from collections.abc import Iterable, Iterator

from torch import fx

from ..dims.dims import Atom, leaves
from ..dims.rule_registry import Typing
from ..graph.walk import downstream
from .branches import Branch

BRANCH = "branch"
AXIS_KINDS = (
    "hidden states", "experts", "queries per key", "heads", "head dims", "channel groups", "residual width", "channels",
    "embedding columns", "neurons",
)  # fmt: skip


def kind_of(types: Typing, branches: Iterable[Branch]) -> dict[Atom, str]:
    """The kind of every atom that some rule knows."""
    said = [(atom, kind) for dim, kind in types.kinds for atom in leaves(dim)]
    for branch in branches:
        width = types.feature_dim(branch.total)
        if width is not None:
            said += [(atom, "residual width") for atom in leaves(types.of(branch.total)[width])]
    said += [(atom, "hidden states") for atom in _fed_back(types)]
    found: dict[Atom, str] = {}
    for atom, kind in sorted(said, key=lambda pair: AXIS_KINDS.index(pair[1])):
        found.setdefault(atom, kind)
    return found


def _fed_back(types: Typing) -> Iterator[Atom]:
    """The axes that one weight has on both sides, where one of its calls leads to another."""
    calls: dict[str, list[fx.Node]] = {}
    for node in types.gm.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            calls.setdefault(str(node.target), []).extend([node] if node.op == "call_module" else node.users)
    for target, nodes in calls.items():
        if len(nodes) > 1 and _leads_on(types.gm, nodes):
            for name, dims in types.params.items():
                if f"{name}.".startswith(f"{target}.") and len(dims) > 1:
                    yield from set(leaves(dims[0])) & set(leaves(dims[1]))


def _leads_on(gm: fx.GraphModule, nodes: list[fx.Node]) -> bool:
    """Whether what the first of the nodes computes reaches one of the others."""
    reached = downstream(gm.graph, nodes[:1])
    return not reached.isdisjoint(nodes[1:])
