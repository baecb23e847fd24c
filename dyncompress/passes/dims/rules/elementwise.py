"""Elementwise operators: trailing dims align, equal sizes unify, size 1 broadcasts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ..dims import ONE, Concat, Dim, fresh, split, unify
from ..rule_registry import Dims, Typing, module_rule, rule


def broadcast(operands: Sequence[Dims]) -> Dims:
    """Dims of the broadcast of several tensors."""
    rank = max(map(len, operands), default=0)
    out: list[Dim] = []
    for at in range(-rank, 0):
        here = [dims[at] for dims in operands if len(dims) >= -at]
        wide = [d for d in here if d.size != 1]
        for other in wide[1:]:
            unify(wide[0], other)
        out.append(wide[0] if wide else ONE)
    return tuple(out)


def tensor_dims(t: Typing, args: dict[str, Any]) -> list[Dims]:
    """Dims of every tensor among a call's arguments, lists included."""
    flat: list[Any] = []
    for value in args.values():
        flat += value if isinstance(value, list | tuple) else [value]
    return [t.of(a) for a in flat if isinstance(a, fx.Node) and t.of(a) != ()]


@rule(
    "pointwise", "dropout", "feature_dropout", "alpha_dropout", "to", "_to_copy", "type_as", "contiguous", "clone",
    "detach", "alias", "lift_fresh_copy", "masked_fill", "silu", "hardtanh", "hardswish", "hardsigmoid", "relu6",
    "selu", "celu", "rrelu", "where", "addcmul", "addcdiv", "lerp", "bernoulli", "copy", "fill", "softplus", "fmod",
    "__and", "__or", "__xor", "_conj", "nan_to_num", "isfinite", "log_sigmoid", "float_power", "square", "floor_divide",
)  # fmt: skip
def pointwise(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    return broadcast(tensor_dims(t, a))


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def like(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    return t.of(a["self"])


@module_rule(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
def dropout(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    return t.of(a["input"])


@rule("glu")
def glu(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    """x = a + b along the dim; out = a * sigmoid(b)."""
    dims = list(t.of(a["self"]))
    at = a["dim"]
    half, gate = split(dims[at], [dims[at].size // 2] * 2)
    unify(half, gate)
    dims[at] = half
    return tuple(dims)


@rule("prelu")
def prelu(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    return _prelu(t.of(a["self"]), t.of(a["weight"]))


@module_rule(nn.PReLU)
def prelu_module(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    return _prelu(t.of(a["input"]), t.param(f"{a['name']}.weight"))


def _prelu(x: Dims, weight: Dims) -> Dims:
    if weight[0].size > 1:
        unify(x[1], weight[0])
    return x


@rule("view_as_real")
def view_as_real(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    return (*t.of(a["self"]), fresh(2, "real and imaginary part"))


@rule("view_as_complex")
def view_as_complex(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    t.freeze_all(t.of(a["self"])[-1], "real and imaginary part")
    return t.of(a["self"])[:-1]


__all__ = ["Concat", "broadcast", "pointwise", "tensor_dims", "torch"]
