"""The call structure of a captured model as JSON: how its inputs nest and how its output does.

A structure is "*" for a leaf, {"tuple": [..]}, {"list": [..]} or {"dict": [[key, structure], ..]}. A dataclass or any
other registered container is written as a dict of its field names, so that no class is needed to load the model. No
output structure at all (null) means that the graph returns its output as it stands.
"""

import keyword
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ...errors import DynCompressError, RequestError
from ...passes.graph.call_structure import CallStructure, call_structure, is_plain, set_call_structure
from .json_values import decode, encode

_LEAF = "*"


def encode_call(graph: fx.Graph) -> dict[str, Any] | None:
    """The names of the graph's arguments and the structures of its inputs and its output; None for a plain graph.

    Raises:
        DynCompressError: an input or the output is of a registered type that does not tell its field names.
    """
    if is_plain(graph):
        return None
    arguments, inputs, output = call_structure(graph)
    return {"arguments": arguments, "inputs": _encode(inputs), "output": None if output is None else _encode(output)}


def set_call(graph: fx.Graph, call: dict[str, Any] | None) -> None:
    """Gives the graph the call structure that `encode_call` wrote.

    Raises:
        RequestError: the structure does not fit the graph, or an argument's name is not a Python name.
    """
    if call is None:
        return
    arguments, inputs = call["arguments"], _decode(call["inputs"])
    output = None if call["output"] is None else _decode(call["output"])
    keywords = _keywords(inputs)
    for name in [*arguments, *keywords]:
        check_identifier(name)
    placeholders, leaves = graph.find_nodes(op="placeholder"), graph.output_node().args[0]
    if inputs.num_leaves != len(placeholders):
        raise RequestError(f"its {len(placeholders)} inputs do not fit its call structure of {inputs.num_leaves}")
    if output is not None and (not isinstance(leaves, list | tuple) or output.num_leaves != len(leaves)):
        raise RequestError(f"its outputs do not fit its output structure of {output.num_leaves}")
    set_call_structure(graph, CallStructure(arguments, inputs, output))


def check_identifier(name: Any) -> None:
    """Names become Python source in the graph's generated code, so nothing but a name may pass.

    Raises:
        RequestError: `name` is not a Python name, or one that the generated code needs itself.
    """
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name == "self":
        raise RequestError(f"{str(name)[:60]!r} is not a valid argument name")


def _keywords(inputs: Any) -> list[Any]:
    """Keys of the keyword arguments, where the structure is (positional arguments, keyword arguments)."""
    if inputs.type is not tuple or inputs.num_children != 2 or inputs.child(1).type is not dict:
        return []
    return list(inputs.child(1).context)


def _encode(spec: Any) -> Any:
    if spec.is_leaf():
        return _LEAF
    children = [_encode(child) for child in spec.children()]
    if spec.type is list or spec.type is tuple:
        return {spec.type.__name__: children}
    if pytree.is_namedtuple_class(spec.type):
        return {"tuple": children}
    keys = [encode(key, f"a key of the {spec.type.__name__}") for key in _field_names(spec)]
    return {"dict": [[key, child] for key, child in zip(keys, children, strict=True)]}


def _field_names(spec: Any) -> list[Any]:
    if spec.type is dict:
        return list(spec.context)
    with_keys = pytree.SUPPORTED_NODES[spec.type].flatten_with_keys_fn
    if with_keys is None:
        raise DynCompressError(
            f"{spec.type.__name__} cannot be saved because it does not tell its field names: register it with "
            "flatten_with_keys_fn, or return a dict"
        )
    sample = spec.unflatten([torch.empty(0, device="meta")] * spec.num_leaves)
    return [getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key, _ in with_keys(sample)[0]]


def _decode(structure: Any) -> Any:
    return pytree.tree_structure(_sample(structure))


def _sample(structure: Any) -> Any:
    """Nested containers with a 0 at each leaf."""
    if structure == _LEAF:
        return 0
    ((kind, children),) = structure.items()
    if kind == "dict":
        return {decode(key): _sample(child) for key, child in children}
    if kind in {"tuple", "list"}:
        return (tuple if kind == "tuple" else list)(_sample(child) for child in children)
    raise RequestError(f"unknown structure {str(kind)[:60]!r}")
