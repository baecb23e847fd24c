"""What typing rules register with and work on: `rule`, `module_rule` and the `Typing` that they fill."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx, nn

from ..graph.nodes import attribute, op_name
from .dims import ONE, Atom, Concat, Dim, Product, freeze, fresh, leaves, resolve

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
    def outputs(self) -> set[Dim]:
        """What layers put out: the dim 0 of every weight, bias and scale, whole; complete as `_computed` is."""
        return {resolve(dims[0]) for dims in self.params.values() if dims}

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
