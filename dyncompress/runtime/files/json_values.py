"""Python values of a graph as plain JSON and back, without loss and without evaluating anything.

None, bool, int, str, finite floats and lists are written as they are. Everything else is an object of one key that
names its kind: {"tuple": [..]}, {"dict": {..}}, {"node": "relu"}, {"float": "inf"}, {"dtype": "float32"},
{"tensor": ["float32", [53, 64]]} for the shape-only tensors of `meta["val"]`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import DynCompressError, RequestError

Nodes = Mapping[str, fx.Node]


def _by_name(kind: type) -> dict[str, Any]:
    return {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, kind)}


_DTYPES = _by_name(torch.dtype)
_CONSTANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "dtype": (torch.dtype, _DTYPES),
    "layout": (torch.layout, _by_name(torch.layout)),
    "memory_format": (torch.memory_format, _by_name(torch.memory_format)),
}


def encode(value: Any, where: str) -> Any:
    """`value` as JSON.

    Args:
        where: what holds the value, for the error message.

    Raises:
        DynCompressError: the value, or one inside it, has no JSON form.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, list):
        return [encode(v, where) for v in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [encode(v, where) for v in value]}
    if isinstance(value, dict):
        return _encode_dict(value, where)
    return _encode_special(value, where)


def _encode_dict(value: dict[Any, Any], where: str) -> Any:
    if all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(v, f"{where}[{key!r}]") for key, v in value.items()}}
    return {"items": [[encode(k, where), encode(v, where)] for k, v in value.items()]}


def _encode_special(value: Any, where: str) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, slice):
        return {"slice": [encode(v, where) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, complex):
        return {"complex": [encode(value.real, where), encode(value.imag, where)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, Tensor) and value.device.type == "meta":
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    for tag, (kind, _) in _CONSTANTS.items():
        if isinstance(value, kind):
            return {tag: str(value).removeprefix("torch.")}
    raise DynCompressError(f"{where} holds a {type(value).__name__}, which a checkpoint cannot carry")


def decode(data: Any, nodes: Nodes | None = None) -> Any:
    """The value that `encode` wrote as `data`; `nodes` are the graph nodes it may refer to, by name.

    Raises:
        RequestError: `data` is nothing that `encode` writes.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return [decode(v, nodes) for v in data]
    if isinstance(data, dict) and len(data) == 1:
        tag, content = next(iter(data.items()))
        if tag == "node":
            return _node(content, nodes or {})
        if tag in _CONSTANTS:
            return _constant(tag, content)
        if tag in _DECODERS:
            return _DECODERS[tag](content, nodes)
    raise RequestError(f"malformed value {str(data)[:60]}")


def _node(name: str, nodes: Nodes) -> fx.Node:
    if name not in nodes:
        raise RequestError(f"an argument refers to the unknown node {str(name)[:60]!r}")
    return nodes[name]


def _constant(tag: str, name: str) -> Any:
    known = _CONSTANTS[tag][1]
    if name not in known:
        raise RequestError(f"unknown {tag} {str(name)[:60]!r}")
    return known[name]


def _float(text: str, _: Nodes | None) -> float:
    if text not in {"inf", "-inf", "nan"}:
        raise RequestError(f"malformed number {str(text)[:60]!r}")
    return float(text)


def _tensor(content: list[Any], _: Nodes | None) -> Tensor:
    dtype, shape = content
    return torch.empty(shape, dtype=_constant("dtype", dtype), device="meta")


_DECODERS: dict[str, Callable[[Any, Nodes | None], Any]] = {
    "tuple": lambda content, nodes: tuple(decode(v, nodes) for v in content),
    "dict": lambda content, nodes: {str(k): decode(v, nodes) for k, v in content.items()},
    "items": lambda content, nodes: {decode(k, nodes): decode(v, nodes) for k, v in content},
    "slice": lambda content, nodes: slice(*(decode(v, nodes) for v in content)),
    "complex": lambda content, nodes: complex(*(decode(v, nodes) for v in content)),
    "device": lambda content, _: torch.device(str(content)),
    "ellipsis": lambda _, __: Ellipsis,
    "float": _float,
    "tensor": _tensor,
}
