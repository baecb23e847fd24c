"""Tensors made from nothing: constants may shrink with what they meet, counters may not."""

from typing import Any

from torch import fx

from ..dims import fresh
from ..rule_registry import Dims, Typing, rule


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def constant(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    shape = node.meta["val"].shape
    return tuple(t.size(arg, size) for arg, size in zip(a["size"], shape, strict=True))


@rule("arange", "linspace", "eye", "scalar_tensor", "full_like_scalar", "_tensor_constant", "logspace", "tensor")
def counter(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    return tuple(fresh(s, "counted") for s in node.meta["val"].shape)


@rule("device_of")
def device_of(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    return ()
