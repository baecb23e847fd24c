"""Statistics that a call computes over a shrunk axis, written out so that they divide by the old count.

With n the old count, c the correction and x the values left (the others are zero):
    mean = sum(x) / n,   var = (sum(x * (x - 2 * mean)) + n * mean^2) / (n - c)
which does not say how many are left, so that the graph may shrink again.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..dims.dims import Dim, leaves
from ..dims.rule_registry import BATCH
from ..graph.nodes import bound_args, op_name

aten = torch.ops.aten
Call = Callable[..., fx.Node]


def rescale(node: fx.Node, ratio: float) -> None:
    """Multiplies what a call returns: a mean over new / old of the values it once had."""
    with node.graph.inserting_after(node):
        scaled = node.graph.call_function(aten.mul.Tensor, (node, ratio))
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    scaled.meta = dict(node.meta)


def count_op(old: fx.Node, new: fx.Node, dims: Sequence[Dim]) -> bool:
    """Replaces a call that averages over what is left of `dims` by one that divides by the old count; False where it is
    not known how.

    Args:
        old: the call before shrinking, for its operator.
        new: the call to replace.
    """
    write = _WRITERS.get(op_name(old))
    if write is None or any(leaf.frozen == BATCH for dim in dims for leaf in leaves(dim)):  # a count that varies
        return False
    last = new

    def call(op: Any, *args: Any) -> fx.Node:
        nonlocal last
        with new.graph.inserting_after(last):
            last = new.graph.call_function(op, args)
        last.meta = {**new.meta, "val": op(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))}
        return last

    values = write(call, bound_args(new), math.prod(d.size for d in dims))
    _put(new, values)
    return True


def _put(node: fx.Node, values: Sequence[fx.Node]) -> None:
    if not isinstance(node.meta["val"], tuple | list):
        node.replace_all_uses_with(values[-1])
    else:
        for user in list(node.users):
            user.replace_all_uses_with(values[user.args[1]])  # type: ignore[index]
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def _moments(call: Call, x: fx.Node, dims: list[int], n: int, correction: float) -> tuple[fx.Node, fx.Node]:
    """Mean and variance, the reduced dims kept as 1."""
    mean = call(aten.div.Scalar, call(aten.sum.dim_IntList, x, dims, True), n)
    apart = call(aten.mul.Tensor, x, call(aten.sub.Tensor, x, call(aten.mul.Scalar, mean, 2)))
    squares = call(aten.mul.Scalar, call(aten.mul.Tensor, mean, mean), n)
    spread = call(aten.add.Tensor, call(aten.sum.dim_IntList, apart, dims, True), squares)
    return mean, call(aten.div.Scalar, spread, n - correction)


def _standardised(call: Call, x: fx.Node, dims: list[int], n: int, eps: float) -> fx.Node:
    mean, var = _moments(call, x, dims, n, 0)
    return call(
        aten.mul.Tensor, call(aten.sub.Tensor, x, mean), call(aten.rsqrt.default, call(aten.add.Scalar, var, eps))
    )


def _affine(call: Call, x: fx.Node, a: dict[str, Any], shape: list[int] | None) -> fx.Node:
    for name, op in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        if a.get(name) is not None:
            x = call(op, x, a[name] if shape is None else call(aten.view.default, a[name], shape))
    return x


def _batch_norm(call: Call, a: dict[str, Any], n: int) -> list[fx.Node]:
    rank = a["input"].meta["val"].dim()
    over = [d for d in range(rank) if d != 1]
    x = _standardised(call, a["input"], over, n, a["eps"])
    return [_affine(call, x, a, [1, -1] + [1] * (rank - 2))]


def _layer_norm(call: Call, a: dict[str, Any], n: int) -> list[fx.Node]:
    over = list(range(-len(a["normalized_shape"]), 0))
    return [_affine(call, _standardised(call, a["input"], over, n, a["eps"]), a, None)]


def _rms_norm(call: Call, a: dict[str, Any], n: int) -> list[fx.Node]:
    x, over = a["input"], list(range(-len(a["normalized_shape"]), 0))
    squares = call(aten.sum.dim_IntList, call(aten.mul.Tensor, x, x), over, True)
    eps = torch.finfo(x.meta["val"].dtype).eps if a["eps"] is None else a["eps"]
    scale = call(aten.rsqrt.default, call(aten.add.Scalar, call(aten.div.Scalar, squares, n), eps))
    return [_affine(call, call(aten.mul.Tensor, x, scale), a, None)]


def _spread(root: bool, with_mean: bool) -> Callable[..., list[fx.Node]]:
    def write(call: Call, a: dict[str, Any], n: int) -> list[fx.Node]:
        x = a["self"]
        dims = a["dim"] if a.get("dim") not in (None, []) else list(range(x.meta["val"].dim()))
        dims = [dims] if isinstance(dims, int) else dims
        correction = a.get("correction", 1 if a.get("unbiased", True) else 0)
        mean, var = _moments(call, x, dims, n, 1 if correction is None else correction)
        values = [call(aten.sqrt.default, var) if root else var, *([mean] if with_mean else [])]
        if a.get("keepdim"):
            return values
        return [call(aten.squeeze.dims, value, dims) for value in values]

    return write


_WRITERS: dict[str, Callable[..., list[fx.Node]]] = {
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "var": _spread(root=False, with_mean=False),
    "std": _spread(root=True, with_mean=False),
    "var_mean": _spread(root=False, with_mean=True),
    "std_mean": _spread(root=True, with_mean=True),
}
