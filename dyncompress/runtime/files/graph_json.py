"""A captured graph as JSON: one object per node, in order.

    {"name": "add", "op": "call_function", "target": "aten.add.Tensor", "args": [{"node": "x"}, 1], "meta": {..}}

Node names, argument names and targets end up in the Python source that torch.fx generates. They are therefore checked
to be plain names, and functions come from the closed set of `targets`.
"""

import keyword
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, fx
from torch._ops import OpOverload

from ...errors import DynCompressError, RequestError
from .allowed_operators import find_target, target_name
from .call_json import check_identifier
from .json_values import decode, encode

# What passes read from a node; see passes/lift.py.
NODE_META = ("val", "path", "dynamic")

_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# A path part may be any key of a ModuleDict that cannot leave the string it is quoted in.
_PATH = re.compile(r"[\w :/@+-]+(\.[\w :/@+-]+)*")


def encode_nodes(graph: fx.Graph) -> list[dict[str, Any]]:
    """The graph's nodes as JSON.

    Raises:
        DynCompressError: a node calls a function outside the closed set, or holds a value without a JSON form.
    """
    return [_encode_node(node) for node in graph.nodes]


def _encode_node(node: fx.Node) -> dict[str, Any]:
    where = f"this model cannot be saved: node {node.name}"
    entry: dict[str, Any] = {"name": node.name, "op": node.op, "target": _target(node)}
    if node.args:
        entry["args"] = [encode(arg, where) for arg in node.args]
    if node.kwargs:
        entry["kwargs"] = {key: encode(arg, where) for key, arg in node.kwargs.items()}
    entry["meta"] = {key: encode(node.meta[key], f"{where}, meta {key}") for key in NODE_META if key in node.meta}
    return entry


def _target(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else target_name(node.target)
    if name is None or node.op == "call_method":
        raise DynCompressError(
            f"this model cannot be saved: node {node.name} calls {node.target}, which is outside the operators a "
            "checkpoint may call"
        )
    return name


def decode_nodes(entries: list[dict[str, Any]], modules: Collection[str], tensors: Mapping[str, Tensor]) -> fx.Graph:
    """The graph that `encode_nodes` wrote.

    Args:
        modules: paths that nodes may call.
        tensors: what nodes may read, by path.

    Raises:
        RequestError: a node is not one that `encode_nodes` writes, or refers to what is not there.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in entries:
        name, op = entry["name"], entry["op"]
        target = _checked_target(op, entry["target"], modules, tensors)
        args = tuple(decode(arg, nodes) for arg in entry.get("args", []))
        kwargs = {key: decode(arg, nodes) for key, arg in entry.get("kwargs", {}).items()}
        _check_kwargs(target, kwargs)
        if not _NODE_NAME.fullmatch(name) or keyword.iskeyword(name) or name in nodes:
            raise RequestError(f"{str(name)[:60]!r} is not a valid node name")
        node = graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            raise RequestError(f"{name!r} is not a valid node name")
        node.meta = {key: decode(entry["meta"][key]) for key in NODE_META if key in entry["meta"]}
        if op == "get_attr":
            _check_shape(node, tensors[target])
        nodes[name] = node
    if [entry["op"] for entry in entries].count("output") != 1 or entries[-1]["op"] != "output":
        raise RequestError("its graph does not end in one output")
    return graph


def _checked_target(op: str, target: str, modules: Collection[str], tensors: Mapping[str, Tensor]) -> Any:
    if op == "call_function":
        return find_target(target)
    if op == "placeholder":
        check_identifier(target)
        return target
    if op == "output":
        return "output"
    known = {"call_module": modules, "get_attr": tensors}.get(op)
    if known is None:
        raise RequestError(f"unknown kind of node {str(op)[:60]!r}")
    check_path(target)
    if target not in known:
        raise RequestError(f"a node refers to {target!r}, which is not in the file")
    return target


def _check_shape(node: fx.Node, tensor: Tensor) -> None:
    val = node.meta.get("val")
    if isinstance(val, Tensor) and val.shape != tensor.shape:
        raise RequestError(f"tensor {node.target} is {list(tensor.shape)} where the graph expects {list(val.shape)}")


def check_path(path: Any) -> None:
    """Raises RequestError unless `path` is a dotted module or tensor path that generated code may quote."""
    if not isinstance(path, str) or not _PATH.fullmatch(path) or any(p.startswith("__") for p in path.split(".")):
        raise RequestError(f"{str(path)[:60]!r} is not a valid module or tensor path")


def _check_kwargs(target: Any, kwargs: dict[str, Any]) -> None:
    for name in kwargs:
        check_identifier(name)
    if isinstance(target, OpOverload) and not set(kwargs) <= {a.name for a in target._schema.arguments}:
        raise RequestError(f"{target} has no argument {', '.join(kwargs)}")
