"""Types every tensor of a captured graph: one dim type per tensor dimension, by one walk over the nodes.

A rule (see `rules/`) sees a node's arguments and gives its output dims, unifying what must agree on the way. A node
without a rule, or whose rule contradicts the traced shape, freezes everything it touches and is reported by name.
"""

from typing import Any

import torch
from torch import Tensor, fx

from ..graph.nodes import attribute, bound_args, op_name
from . import rules  # noqa: F401 - registers every rule
from .dims import ONE, fresh
from .rule_registry import BATCH, MODULE_RULES, OP_RULES, Dims, Rule, Typed, Typing


def type_graph(gm: fx.GraphModule) -> Typing:
    """Types the dims of a captured graph (one pass over its nodes)."""
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
