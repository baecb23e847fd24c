"""Cut points: where a graph can be cut so that some samples stop there and the others go on; blocks lie between them.

After each node, the live values are those computed so far and used later. A cut needs every one of them to cross:

    per sample   a tensor whose dim 0 is exactly the batch: it is compacted with the samples
    shared       a tensor or number that no sample's values or batch size went into: it passes as it is
    remade       batch sizes, devices, parameters and what only they make: never live, made again after the cut
"""

from collections.abc import Callable, Collection, Mapping
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from ..capture.lift import device_of
from ..dims.dims import leaves
from ..dims.rule_registry import Typing
from ..graph.aliasing import overwritten
from ..graph.nodes import attribute

aten = torch.ops.aten
_NEW_TENSORS = {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default}


class Flow:
    """Which values of a graph cross a cut, and how.

    `learned`: nodes that a parameter has worked on. `remade`: nodes made again after a cut instead of crossing it.
    """

    def __init__(self, types: Typing, macs: Mapping[fx.Node, int]) -> None:
        self.types, gm = types, types.gm
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self._batch = set(leaves(types.batch))
        self.learned: set[fx.Node] = set()
        self.remade: set[fx.Node] = set()
        self._from_samples: set[fx.Node] = set()  # by value: these differ from sample to sample
        self._from_batch: set[fx.Node] = set()  # by size only: these must be made again
        self._needs: dict[fx.Node, frozenset[fx.Node]] = {}
        self._last_use: dict[fx.Node, int] = {}
        for node in gm.graph.nodes:
            self._classify(gm, node, macs[node])
            self._note_uses(node)

    def per_sample(self, node: fx.Node) -> bool:
        """Whether `node` is a tensor with one entry per sample along dim 0."""
        is_tensor = isinstance(node.meta.get("val"), Tensor)
        return is_tensor and node in self._from_samples and self.types.batch_dim(node) == 0

    def crosses(self, node: fx.Node) -> bool:
        """Whether a live value may cross a cut."""
        if overwritten(node):
            return False  # an exit head there would lose what it saved for its backward pass
        if self.per_sample(node):
            return True
        shared = node not in self._from_samples and node not in self._from_batch
        return shared and isinstance(node.meta.get("val"), Tensor | int | float)

    def live_after(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Values computed up to `node` that later nodes need, in graph order."""
        return self._live[node]

    @cached_property
    def _live(self) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """What is live after each node, by one walk that drops every value at its last use."""
        last_used: dict[int, list[fx.Node]] = {}
        for node, last in self._last_use.items():
            last_used.setdefault(last, []).append(node)
        live: dict[fx.Node, None] = {}
        after = {}
        for node, at in self.order.items():
            for done in last_used.get(at, ()):
                del live[done]
            if node in self._last_use:
                live[node] = None
            after[node] = tuple(live)
        return after

    def entering(self, nodes: Collection[fx.Node]) -> tuple[fx.Node, ...]:
        """What a stretch of the graph needs of the rest, in graph order."""
        needed = {n for node in nodes for n in self._needs[node]}
        return tuple(sorted(needed.difference(nodes), key=self.order.__getitem__))

    def _classify(self, gm: fx.GraphModule, node: fx.Node, macs: int) -> None:
        if _has_parameters(gm, node) or any(n in self.learned for n in node.all_input_nodes):
            self.learned.add(node)
        if node.op == "get_attr" or node.target is device_of:
            self.remade.add(node)
        elif node.target is aten.sym_size.int:
            self._classify_size(node)
        elif self._is_from_samples(node):
            self._from_samples.add(node)
        elif any(n in self._from_batch for n in node.all_input_nodes):
            self._from_batch.add(node)
            if macs == 0 and self._can_be_remade(node):
                self.remade.add(node)

    def _is_from_samples(self, node: fx.Node) -> bool:
        if node.target in _NEW_TENSORS and not self.types.has_batch(node):
            return False  # it takes only dtype and device from its input
        batched = node.op == "placeholder" and 0 in node.meta.get("dynamic", ())
        return batched or any(n in self._from_samples for n in node.all_input_nodes)

    def _classify_size(self, node: fx.Node) -> None:
        """A batch size is read again after a cut; a size that may only contain the batch cannot be."""
        tensor, dim = node.args
        assert isinstance(tensor, fx.Node) and isinstance(dim, int)
        dims = self.types.of(tensor)
        unknown = tensor in self._from_samples and not self.types.has_batch(tensor)
        if not unknown and not any(leaf in self._batch for leaf in leaves(dims[dim])):
            return
        self._from_batch.add(node)
        if self.types.batch_dim(tensor) == dim % len(dims):
            self.remade.add(node)

    def _can_be_remade(self, node: fx.Node) -> bool:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        inputs = (n in self.remade or n not in self._from_batch for n in node.all_input_nodes)
        return node.op == "call_function" and not random and all(inputs) and not overwritten(node)

    def _note_uses(self, node: fx.Node) -> None:
        """Values that `node` needs, through remade ones; a remade node uses nothing itself."""
        needs: set[fx.Node] = set()
        if node.target is not aten.sym_size.int or node not in self.remade:
            for n in [] if node.target is device_of else node.all_input_nodes:
                needs |= self._needs[n] if n in self.remade else {n}
        self._needs[node] = frozenset(needs)
        if node not in self.remade:
            self._last_use.update(dict.fromkeys(needs, self.order[node]))


def remake(graph: fx.Graph, node: fx.Node, anchor: fx.Node, fetch: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """Makes a remade node again in `graph`, with the batch size and the device of `anchor`; `fetch` gives the rest."""
    if node.target is device_of:
        return like(node, graph.create_node("call_function", device_of, (anchor,), name=node.name))
    if node.target is aten.sym_size.int:
        return like(node, graph.create_node("call_function", node.target, (anchor, 0), name=node.name))
    return graph.node_copy(node, fetch)


def like(node: fx.Node, made: fx.Node) -> fx.Node:
    """`made`, with the meta of `node`."""
    made.meta = dict(node.meta)
    return made


def _has_parameters(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "get_attr":
        return isinstance(attribute(gm, str(node.target)), nn.Parameter)
    return node.op == "call_module" and any(True for _ in gm.get_submodule(str(node.target)).parameters())
