"""Graphs as they run often, on one sample: the same operators on the same numbers, with less Python around them.

1. a module is looked up in its parent's dict, where attributes of modules that are modules are a call each;
2. an operator that torch has a builtin for is that builtin, whose arguments are not matched with a schema in Python;
3. a gate's layers, which take less time than a call of a module, are calls of functions, and a recurrent gate's step
   is one (`lean_cell`).

Everything is still found anew in each call, so that nothing goes stale.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ...passes.gates.insert_gates import GATES_PATH
from .fused_gate_cell import use_cells

aten = torch.ops.aten
_BUILTIN: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.cat.default: torch.cat,
    aten.flatten.using_ints: torch.flatten,
    aten.gt.Scalar: torch.gt,
    aten.mean.dim: torch.mean,
    aten.mul.Tensor: torch.mul,
    aten.relu.default: torch.relu,
    aten.sigmoid.default: torch.sigmoid,
    aten.squeeze.dim: torch.squeeze,
    aten.tanh.default: torch.tanh,
}


def make_lean(piece: fx.GraphModule) -> None:
    """Rewrites, in place, how a piece of a trunk is run."""
    use_cells(piece)
    for node in list(piece.graph.nodes):
        if node.op == "call_function":
            node.target = _BUILTIN.get(node.target, node.target)
        elif node.op == "call_module" and str(node.target).startswith(f"trunk.{GATES_PATH}"):
            _call_a_function(piece, node)
    found = {}
    for node in piece.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            found[_attribute(str(node.target))] = _in_dicts(str(node.target), node.op)
    piece.graph.on_generate_code(lambda _: lambda lines: [_found_directly(line, found) for line in lines])
    piece.recompile()


def _call_a_function(piece: fx.GraphModule, node: fx.Node) -> None:
    """Makes the call of a linear layer or a convolution a function's; of another layer it stays as it is."""
    layer = piece.get_submodule(str(node.target))
    function: Callable[..., Any]
    options: tuple[Any, ...]
    if type(layer) is nn.Linear:
        function, options = F.linear, ()
    elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        function, options = F.conv2d, (layer.stride, layer.padding, layer.dilation, layer.groups)
    else:
        return
    with piece.graph.inserting_before(node):
        weight = piece.graph.get_attr(f"{node.target}.weight")
        bias = None if layer.bias is None else piece.graph.get_attr(f"{node.target}.bias")
        call = piece.graph.call_function(function, (*node.args, weight, bias, *options))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    piece.graph.erase_node(node)


def _attribute(target: str) -> str:
    """How generated code reads an attribute."""
    text = "self"
    for part in target.split("."):
        text = f"{text}.{part}" if part.isidentifier() else f'getattr({text}, "{part}")'
    return text


def _in_dicts(target: str, op: str) -> str:
    """How lean code reads it: a module through the dicts of those it is in, a tensor as an attribute of its layer."""
    first, *rest = target.split(".")
    if not rest:
        return f"self._modules['{first}'].forward"  # the piece's own: nobody else has put hooks there
    *path, last = rest
    end = f"._modules['{last}']" if op == "call_module" else f".{last}"
    return f"self.{first}" + "".join(f"._modules['{part}']" for part in path) + end


def _found_directly(line: str, found: dict[str, str]) -> str:
    name, equals, rest = line.partition(" = ")
    path, called, args = _divided(rest)
    return name + equals + found.get(path, path) + called + args


def _divided(text: str) -> tuple[str, str, str]:
    """What is called, and the rest; `getattr(...)` may be part of the former."""
    begin = text.rfind('")') + 2 if text.startswith("getattr(") else 0
    path, called, args = text[begin:].partition("(")
    return text[:begin] + path, called, args
