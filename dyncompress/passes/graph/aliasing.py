"""Which values share memory, and which calls write there: in-place operators and views, read off their schemas."""

import operator

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

aten = torch.ops.aten
_FRESH_CALLS = {aten.add.Tensor, aten.mul.Tensor, aten.relu.default, aten.gelu.default, aten.silu.default}
_FRESH_LAYERS = (_ConvNd, _BatchNorm, nn.Linear, nn.LayerNorm, nn.GroupNorm)


def storage(node: fx.Node) -> fx.Node:
    """The node whose memory `node` returns: itself, or what it is a view or an in-place result of."""
    while True:
        if node.op != "call_function":
            return node
        sources = [node.args[0]] if node.target is operator.getitem else [arg for arg, _ in aliases(node)]
        source = next(iter(sources), None)
        if not isinstance(source, fx.Node):
            return node
        node = source


def written(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory a call writes to."""
    return [storage(arg) for arg, writes in aliases(node) if writes]


def aliases(node: fx.Node) -> list[tuple[fx.Node, bool]]:
    """Arguments that the call returns a view of or writes to, and whether it writes."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    pairs = zip(schema.arguments, node.args, strict=False)
    known = [(arg, a.alias_info) for a, arg in pairs if a.alias_info is not None and isinstance(arg, fx.Node)]
    return [(arg, info.is_write) for arg, info in known]


def overwritten(node: fx.Node) -> bool:
    """Whether an in-place operator writes to `node`, directly or through a view of it."""
    calls = [(user, writes) for user in node.users for arg, writes in aliases(user) if arg is node]
    return any(writes or overwritten(user) for user, writes in calls)


def is_fresh(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether what `node` gives is surely memory of its own, of which nobody else knows."""
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), _FRESH_LAYERS)
    return node.op == "call_function" and node.target in _FRESH_CALLS
