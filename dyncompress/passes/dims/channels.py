"""Which dim of a tensor holds the channels that a layer put out."""

from torch import fx

from .dims import resolve
from .rule_registry import Typing


def channel_dim(types: Typing, node: fx.Node) -> int | None:
    """The dim that holds what a layer puts out: the dim 0 of some weight, bias or scale, whole.

    A map that is flattened into a classifier shares its height and width with that weight too, never as its outputs.
    """
    dims = [resolve(d) for d in types.of(node)]
    hits = [i for i, d in enumerate(dims) if i > 0 and d.size > 1 and d in types.outputs]
    return hits[-1] if hits else types.feature_dim(node)
