"""Nodes of a captured graph: an operator's name, its arguments by name, the attribute at a dotted path."""

from functools import cache
from typing import Any

from torch import fx, nn


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


def attribute(root: nn.Module, path: str) -> Any:
    """The attribute of a module at a dotted path."""
    *parents, name = path.split(".")
    for part in parents:
        root = root._modules[part]  # type: ignore[assignment]  # asking the module itself takes many times as long
    return getattr(root, name)
