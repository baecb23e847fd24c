"""Types every tensor of a captured graph: one dim type per tensor dimension, by one walk over the nodes.

A rule (see `rules/`) sees a node's arguments and gives its output dims, unifying what must agree on the way. A node
without a rule, or whose rule contradicts the traced shape, freezes everything it touches and is reported by name.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from .dims import ONE, Atom, Concat, Dim, Product, freeze, fresh, leaves, resolve, unify

Dims = tuple[Dim, ...]
Typed = Any  # Dims, or a tuple of Dims for a node with several outputs
Rule = Callable[["Typing", fx.Node, dict[str, Any]], Typed]

BATCH = "the batch"  # why its axis cannot shrink
OP_RULES: dict[str, Rule] = {}
MODULE_RULES: dict[type[nn.Module], Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Registers a rule for ATen operators by name, all overloads and in-place variants."""

    def register(function: Rule) -> Rule:
        OP_RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def module_rule(*kinds: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Registers a rule for calls of standard modules."""

    def register(function: Rule) -> Rule:
        MODULE_RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


def op_name(node: fx.Node) -> str:
    """`conv2d` for any overload or in-place variant of aten.conv2d; the plain name for other callables."""
    return _name_of(node.target)


@cache
def _name_of(target: Any) -> str:
    name = str(getattr(target, "_overloadpacket", getattr(target, "__name__", target)))
    return name.rpartition(".")[2].rstrip("_") if name.startswith("aten.") else name


def bound_args(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by name, schema defaults filled in."""
    if getattr(node.target, "_schema", None) is None:
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    names, defaults = _signature(node.target)
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


@cache
def _signature(target: Any) -> tuple[list[str], dict[str, Any]]:
    """Names and defaults of an operator's arguments."""
    arguments = target._schema.arguments
    return [a.name for a in arguments], {a.name: a.default_value for a in arguments if a.has_default_value()}


@dataclass
class Statistic:
    """A node whose values mix the indices of a dim without weights (a mean, a norm): shrinking it changes counts."""

    dim: Dim
    node: str


@dataclass
class Typing:
    """Dim types of a graph: of every node, and of every parameter and buffer by name.

    `groups` is the dim that a node counts its groups by, `pieces` what a node cuts a dim into: sizes that calls spell
    out and shrinking must read again. `features` are the dims that layers compute; `kinds` what rules know dims to be.
    """

    gm: fx.GraphModule
    dims: dict[fx.Node, Typed] = field(default_factory=dict)
    params: dict[str, Dims] = field(default_factory=dict)
    statistics: list[Statistic] = field(default_factory=list)
    untyped: dict[str, str] = field(default_factory=dict)
    batch: Dim = ONE
    features: list[Dim] = field(default_factory=list)
    groups: dict[fx.Node, Dim] = field(default_factory=dict)
    pieces: dict[fx.Node, list[Dim]] = field(default_factory=dict)
    kinds: list[tuple[Dim, str]] = field(default_factory=list)
    _by_tensor: dict[int, Dims] = field(default_factory=dict)

    # --- what rules use ------------------------------------------------------------------------------------------

    def of(self, arg: Any) -> Typed:
        """Dims of a tensor argument; () for a number."""
        return self.dims.get(arg, ()) if isinstance(arg, fx.Node) else ()

    def param(self, name: str) -> Dims:
        """Dims of the parameter or buffer of this dotted name; tied tensors share theirs."""
        if name not in self.params:
            tensor = attribute(self.gm, name)
            dims = self._by_tensor.setdefault(id(tensor), tuple(fresh(s) for s in tensor.shape))
            self.params[name] = dims
        return self.params[name]

    def size(self, arg: Any, size: int) -> Dim:
        """The dim that a size argument asks for: the measured dim for a size read from a tensor, else a fresh axis.

        (A product of such sizes says nothing about the order of its factors; the data does.)
        """
        if isinstance(arg, fx.Node) and op_name(arg) == "sym_size":
            return self.dims[arg.args[0]][arg.args[1]]  # type: ignore[index]
        return fresh(size)

    def feature(self, dim: Dim, kind: str) -> None:
        """Notes that a layer computes `dim`, whose indices are `kind`."""
        self.features.append(dim)
        self.kinds.append((dim, kind))

    def statistic(self, node: fx.Node, dims: Iterable[Dim]) -> None:
        """Notes that `node` averages over `dims`."""
        self.statistics += [Statistic(dim, node.name) for dim in dims]

    def freeze_all(self, typed: Any, reason: str) -> None:
        """Freezes every dim in a nest of dims."""
        if isinstance(typed, Atom | Product | Concat):
            freeze(typed, reason)
        elif isinstance(typed, tuple | list):
            for part in typed:
                self.freeze_all(part, reason)

    # --- what other passes ask -----------------------------------------------------------------------------------

    def batch_dim(self, node: fx.Node) -> int | None:
        """The index of the dim of `node` that is exactly the batch axis; None if there is none."""
        dims = self._plain(node)
        batch = resolve(self.batch)
        return next((i for i, d in enumerate(dims) if resolve(d) == batch and batch != ONE), None)

    def has_batch(self, node: fx.Node) -> bool:
        """Whether the batch axis occurs anywhere in the dims of `node`, inside products too."""
        batch = set(leaves(self.batch))
        return any(leaf in batch for d in flat(self.of(node)) for leaf in leaves(d))

    def feature_dim(self, node: fx.Node) -> int | None:
        """The last tensor dim of `node` that holds an axis some layer computes (channels, features); None if none."""
        features = self._computed
        hits = [i for i, d in enumerate(self._plain(node)) if any(leaf in features for leaf in leaves(d))]
        return hits[-1] if hits else None

    @cached_property
    def _computed(self) -> set[Atom]:
        """The axes that layers compute; complete once the graph is typed, when passes ask."""
        return {leaf for dim in self.features for leaf in leaves(dim)}

    def _plain(self, node: fx.Node) -> Dims:
        dims = self.of(node)
        return () if any(isinstance(d, tuple) for d in dims) else dims


def flat(typed: Any) -> Iterable[Dim]:
    """Every dim in a nest of dims: a node's, whether it has one output or several."""
    for part in typed:
        if isinstance(part, tuple | list):
            yield from flat(part)
        else:
            yield part


def attribute(root: nn.Module, path: str) -> Any:
    """The attribute of a module at a dotted path."""
    *parents, name = path.split(".")
    for part in parents:
        root = root._modules[part]  # type: ignore[assignment]  # asking the module itself takes many times as long
    return getattr(root, name)


def type_graph(gm: fx.GraphModule) -> Typing:
    """Types the dims of a captured graph (one pass over its nodes)."""
    from . import rules  # noqa: F401 - registers every rule

    types = Typing(gm)
    for node in gm.graph.nodes:
        types.dims[node] = _type_node(types, node)
    return types


def _type_node(types: Typing, node: fx.Node) -> Typed:
    val = node.meta.get("val")
    if node.op == "placeholder":
        return _placeholder(types, node, val)
    if node.op == "get_attr":
        return types.param(str(node.target)) if isinstance(val, Tensor) else ()
    if node.op == "output":
        types.freeze_all([types.of(n) for n in node.all_input_nodes], "it leaves the model as an output")
        return ()
    found, args = _find_rule(types, node)
    if found is None:
        return _untyped(types, node, f"no rule for {_described(types.gm, node)}")
    if not _has_tensor(val):
        return ()
    typed = found(types, node, args)
    if not _fits(typed, val):
        return _untyped(types, node, f"the rule for {op_name(node)} does not describe its shape here", typed)
    return typed


def _find_rule(types: Typing, node: fx.Node) -> tuple[Rule | None, dict[str, Any]]:
    if node.op == "call_module":
        module = attribute(types.gm, str(node.target))
        args = {"module": module, "name": str(node.target), "input": node.args[0] if node.args else None}
        return MODULE_RULES.get(type(module)), args
    name = op_name(node)
    if name in OP_RULES:
        return OP_RULES[name], bound_args(node)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return OP_RULES["pointwise"], bound_args(node)
    if not _has_tensor(node.meta.get("val")):
        return OP_RULES["pointwise"], {}
    return None, {}


def _described(gm: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(attribute(gm, str(node.target))).__name__
    return str(node.target)


def _has_tensor(val: Any) -> bool:
    if isinstance(val, tuple | list):
        return any(map(_has_tensor, val))
    return isinstance(val, Tensor)


def _placeholder(types: Typing, node: fx.Node, val: Any) -> Dims:
    if not isinstance(val, Tensor):
        return ()
    dims = []
    for d, size in enumerate(val.shape):
        if d == 0 and 0 in node.meta.get("dynamic", ()):
            if types.batch == ONE:
                types.batch = fresh(size, BATCH)
            dims.append(types.batch)
        else:
            dims.append(fresh(size, "it enters the model as an input"))
    return tuple(dims)


def _untyped(types: Typing, node: fx.Node, reason: str, typed: Any = ()) -> Typed:
    types.untyped[node.name] = reason
    types.freeze_all([typed, *(types.of(n) for n in node.all_input_nodes)], reason)
    if node.op == "call_module":
        module = attribute(types.gm, str(node.target))
        names = [n for n, _ in [*module.named_parameters(), *module.named_buffers()]]
        types.freeze_all([types.param(f"{node.target}.{n}") for n in names], reason)
    return _frozen_like(node.meta.get("val"), reason)


def _frozen_like(val: Any, reason: str) -> Typed:
    if isinstance(val, Tensor):
        return tuple(fresh(s, reason) for s in val.shape)
    if isinstance(val, tuple | list):
        return tuple(_frozen_like(v, reason) for v in val)
    return ()


def _fits(typed: Typed, val: Any) -> bool:
    if isinstance(val, tuple | list):
        return len(typed) == len(val) and all(_fits(t, v) for t, v in zip(typed, val, strict=True))
    if not isinstance(val, Tensor):
        return True
    return len(typed) == val.dim() and all(d.size == s for d, s in zip(typed, val.shape, strict=True))


__all__ = ["Dims", "Rule", "Typing", "module_rule", "op_name", "rule", "type_graph", "unify"]
