"""Convolutions with g groups: x[1] = g*ci, w[0] = g*co, w[1] = ci; transposed: w[0] = g*ci, w[1] = co."""

from typing import Any

from torch import fx, nn

from ..dims import Dim, Product, freeze, fresh, unify
from ..rule_registry import Dims, Typing, module_rule, rule

SPATIAL = "a spatial size"


def _convolve(t: Typing, node: fx.Node, x: Dims, weight: Dims, bias: Dims, groups: int, transposed: bool) -> Dims:
    for kernel in weight[2:]:
        freeze(kernel, "a kernel size")
    group = t.groups[node] = fresh(groups)
    if transposed:
        unify(weight[0], Product((group, fresh(weight[0].size // groups))))
        unify(x[1], weight[0])
        out: Dim = Product((group, weight[1]))
    else:
        unify(weight[0], Product((group, fresh(weight[0].size // groups))))
        unify(x[1], Product((group, weight[1])))
        out = weight[0]
    if bias:
        unify(out, bias[0])
    t.feature(out, "channels")
    if groups > 1 and weight[0].size > groups:  # depthwise groups are the channels themselves
        t.kinds.append((group, "channel groups"))
    return (x[0], out, *(fresh(s, SPATIAL) for s in node.meta["val"].shape[2:]))


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    transposed = "transpose" in str(node.target)
    return _convolve(t, node, t.of(a["input"]), t.of(a["weight"]), t.of(a["bias"]), a["groups"], transposed)


@module_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def conv_module(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    module, name = a["module"], a["name"]
    weight = t.param(f"{name}.weight")
    bias = t.param(f"{name}.bias") if module.bias is not None else ()
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    return _convolve(t, node, t.of(a["input"]), weight, bias, module.groups, transposed)
