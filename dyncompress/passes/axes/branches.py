"""Residual branches: in y = a + b, b can go as a whole, y = a, when

    only y reads b and what b is computed by (its region),
    the region reads something that a is computed from (so that a still carries the signal), and
    b is zero when the region's own tensors are (so that removing it equals zeroing it).

Each is an axis of one index to the ranking: keeping none of it removes the branch, and the layer with its last branch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx

from ..dims.rule_registry import Typing
from ..graph.aliasing import storage, written
from ..graph.cost import node_macs
from ..graph.module_tree import remove_tensor
from ..graph.nodes import attribute, bound_args, op_name
from ..graph.walk import serving, unread
from .zero_propagation import zero_nodes


@dataclass(frozen=True)
class Branch:
    """`total` = `shortcut` + what `nodes` compute; `tensors` are the parameters and buffers that go with them."""

    name: str
    total: fx.Node
    shortcut: fx.Node
    nodes: tuple[fx.Node, ...]
    tensors: tuple[str, ...]


def find_branches(types: Typing) -> list[Branch]:
    """Every residual branch that can be removed, in graph order; of two addends that both could go, the costlier."""
    search = _Search(types)
    found: list[Branch] = []
    names: set[str] = set()
    for node in types.gm.graph.nodes:
        if node.op == "call_function" and op_name(node) == "add" and isinstance(node.meta.get("val"), Tensor):
            branch = search.at(node, names)
            if branch is not None:
                found.append(branch)
                names.add(branch.name)
    return found


class _Search:
    """What is asked of every addition: order, ancestors, costs, and which nodes use which tensors."""

    def __init__(self, types: Typing) -> None:
        self.gm = types.gm
        self.order = {node: i for i, node in enumerate(self.gm.graph.nodes)}
        self.ancestors: dict[fx.Node, int] = {}  # as bits, the node itself included
        self.tensors: dict[fx.Node, list[tuple[str, Tensor]]] = {}
        self.users_of: dict[int, set[fx.Node]] = {}
        for node, i in self.order.items():
            bits = 1 << i
            for source in node.all_input_nodes:
                bits |= self.ancestors[source]
            self.ancestors[node] = bits
            self.tensors[node] = list(_tensors(self.gm, node))
            for _, tensor in self.tensors[node]:
                self.users_of.setdefault(id(tensor), set()).add(node)
        self.in_place = unread(self.gm.graph)  # nobody reads what they return

    @cached_property
    def macs(self) -> dict[fx.Node, int]:
        """What a node costs, where two addends must be compared."""
        return node_macs(self.gm)

    def at(self, total: fx.Node, taken: set[str]) -> Branch | None:
        args = bound_args(total)
        first, second = args["self"], args["other"]
        if not all(_same_shape(a, total) for a in (first, second)) or args.get("alpha", 1) != 1 or first is second:
            return None
        regions = [(self._region(b, a, total), a, b) for b, a in ((first, second), (second, first))]
        owning = [(region, a, b, tuple(dict.fromkeys(self._own(region)))) for region, a, b in regions]
        able = [(region, a, own) for region, a, b, own in owning if self._removable(region, a, b, own)]
        if not able:
            return None
        region, shortcut, tensors = able[0] if len(able) == 1 else max(able, key=self._cost)
        return Branch(_name(tensors, total, taken), total, shortcut, tuple(region), tensors)

    def _cost(self, found: tuple[list[fx.Node], fx.Node, tuple[str, ...]]) -> int:
        return sum(self.macs[n] for n in found[0])

    def _region(self, end: fx.Node, shortcut: fx.Node, total: fx.Node) -> list[fx.Node]:
        """`end` and whatever serves nothing else; the shortcut and what it comes from stay out."""
        return serving(end, {total}, self.in_place, self.order, lambda node: self._leads_to(node, shortcut))

    def _leads_to(self, node: fx.Node, target: fx.Node) -> bool:
        return bool(self.ancestors[target] >> self.order[node] & 1)

    def _removable(self, region: list[fx.Node], shortcut: fx.Node, end: fx.Node, own: tuple[str, ...]) -> bool:
        inside = set(region)
        if not own:
            return False
        entering = {n for node in region for n in node.all_input_nodes if n not in inside and _is_float(n)}
        fed = any(self._leads_to(n, shortcut) and n.op != "get_attr" for n in entering)
        outward = any(source not in inside for node in region for source in written(node))
        return fed and not outward and end in zero_nodes(self.gm, region, set(own))

    def _own(self, region: Iterable[fx.Node]) -> Iterator[str]:
        """Names of the tensors that only the region uses."""
        inside = set(region)
        for node in region:
            for name, tensor in self.tensors[node]:
                if self.users_of[id(tensor)] <= inside:
                    yield name


def remove_branches(small: fx.GraphModule, branches: Sequence[Branch]) -> None:
    """Takes branches, in graph order, out of a copy of the graph they were found in: nodes, tensors, empty modules."""
    nodes = {node.name: node for node in small.graph.nodes}
    for branch in reversed(branches):  # the outer before the inner
        if branch.total.name not in nodes:  # gone with a branch around it
            continue
        total, shortcut = nodes[branch.total.name], nodes[branch.shortcut.name]
        for user in [user for user in total.users if _repeats(user, shortcut)]:
            user.replace_all_uses_with(shortcut)
            small.graph.erase_node(nodes.pop(user.name))
        if any(storage(total) in written(user) for user in total.users) and storage(total) is not storage(shortcut):
            with small.graph.inserting_before(total):  # who made the shortcut may need it again, to differentiate
                shortcut = small.graph.call_function(torch.ops.aten.clone.default, (shortcut,))
            shortcut.meta = dict(total.meta)
        total.replace_all_uses_with(shortcut)
        for old in (branch.total, *reversed(branch.nodes)):
            small.graph.erase_node(nodes.pop(old.name))
        for name in branch.tensors:
            remove_tensor(small, name)


_IDEMPOTENT = {"relu", "relu6", "hardtanh", "abs"}


def _repeats(user: fx.Node, shortcut: fx.Node) -> bool:
    """Whether an activation does nothing to what the same one made: relu(relu(x)) = relu(x)."""
    calls = user.op == shortcut.op == "call_function"
    return calls and op_name(user) == op_name(shortcut) in _IDEMPOTENT and user.args[1:] == shortcut.args[1:]


def _tensors(gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter and buffer that a node uses itself."""
    if node.op == "get_attr":
        value = attribute(gm, str(node.target))
        if isinstance(value, Tensor):
            yield str(node.target), value
    elif node.op == "call_module":
        module = attribute(gm, str(node.target))
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            yield f"{node.target}.{name}", value


def _is_float(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.is_floating_point()


def _same_shape(arg: Any, node: fx.Node) -> bool:
    return isinstance(arg, fx.Node) and getattr(arg.meta.get("val"), "shape", None) == node.meta["val"].shape


def _name(tensors: tuple[str, ...], total: fx.Node, taken: set[str]) -> str:
    """`layer1.0:branch` after the module that holds all of it, `.1`, `.2` ... for the next ones there."""
    levels = zip(*(name.split(".")[:-1] for name in tensors), strict=False)
    where = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    base = f"{'.'.join(where) or total.name}:branch"
    return next(n for i in range(len(taken) + 1) if (n := f"{base}.{i}" if i else base) not in taken)
