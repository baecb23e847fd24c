"""Exit heads read the channels or features of their cut point; they shrink with them."""

from typing import Any

from torch import fx

from ...modules.exit_heads import ImageHead, TokenHead, VectorHead
from ..dims import Product, fresh, unify
from ..rule_registry import Dims, Typing, module_rule


@module_rule(ImageHead)
def image_head(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    """The linear layer reads channels * grid * grid; `mix` is one number."""
    head, x = a["module"], t.of(a["input"])
    grid = fresh(head.grid**2, "the grid of an exit head")
    return _classify(t, a["name"], x, Product((x[head.channel_dim], grid)))


@module_rule(TokenHead)
def token_head(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x = t.of(a["input"])
    for name in ("weight", "bias"):
        unify(x[-1], t.param(f"{a['name']}.norm.{name}")[0])
    t.statistic(node, x[-1:])
    return _classify(t, a["name"], x, x[-1])


@module_rule(VectorHead)
def vector_head(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x = t.of(a["input"])
    return _classify(t, a["name"], x, x[-1])


def _classify(t: Typing, name: str, x: Dims, features: Any) -> Dims:
    weight, bias = t.param(f"{name}.linear.weight"), t.param(f"{name}.linear.bias")
    unify(features, weight[1])
    unify(weight[0], bias[0])
    return (x[0], weight[0])
