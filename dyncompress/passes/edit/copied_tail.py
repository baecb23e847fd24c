"""A copy of the model's own last layers, reading an earlier node: the head "copy"."""

import torch
from torch import Tensor, fx, nn

from ...errors import RequestError
from ..capture.lift import device_of
from ..graph.copying import deep_copy
from ..graph.nodes import attribute
from .flow import Flow, remake
from .outputs import needed_for


def copy_tail(gm: fx.GraphModule, path: str, flow: Flow, source: fx.Node, logits: fx.Node, at: fx.Node) -> fx.Node:
    """Adds a copy, with parameters of its own below `path`, of what leads from `source` to `logits`, reading `at`.

    Raises:
        RequestError: it reads anything else.
    """
    tail = _tail(flow, source, logits)
    gm.add_submodule(path, nn.Module())
    copies = {source: at}
    end = at

    def fetch(node: fx.Node) -> fx.Node:
        nonlocal end
        if node in copies:
            return copies[node]
        remade = node in flow.remade
        if not (remade and node.target in {device_of, torch.ops.aten.sym_size.int}):  # those read `at` instead
            for needed in node.all_input_nodes:
                fetch(needed)
        with gm.graph.inserting_after(end):
            end = remake(gm.graph, node, at, fetch) if remade else gm.graph.node_copy(node, fetch)
        copies[node] = end
        if end.op in {"call_module", "get_attr"}:
            end.target = _copy_attribute(gm, path, str(node.target))
            end.meta["path"] = end.target
        return end

    for node in tail:
        fetch(node)
    return copies[logits]


def _tail(flow: Flow, source: fx.Node, logits: fx.Node) -> list[fx.Node]:
    needed = needed_for([logits])
    tail = [n for n in flow.order if n in needed and flow.order[n] > flow.order[source] and n not in flow.remade]
    own = {source, *tail}
    others = {n.name for node in tail for n in node.all_input_nodes if n not in own and n not in flow.remade}
    if others:
        raise RequestError(
            f"head='copy': the model's own head, after {source.name}, also reads {', '.join(sorted(others))}; "
            "choose another head"
        )
    return tail


def _copy_attribute(gm: fx.GraphModule, path: str, target: str) -> str:
    """Puts a copy of a module or parameter below `path`, under its own name; returns where."""
    new = f"{path}.{target}"
    copied = deep_copy_of(attribute(gm, target))
    parent, _, name = new.rpartition(".")
    here: nn.Module = gm
    for part in parent.split("."):
        if part not in here._modules:
            here.add_module(part, nn.Module())
        here = here._modules[part]  # type: ignore[assignment]
    if name in here._modules or name in here._parameters or name in here._buffers:
        return new  # called twice
    if isinstance(copied, nn.Module):
        here.add_module(name, copied)
    elif isinstance(copied, nn.Parameter):
        here.register_parameter(name, copied)
    else:
        here.register_buffer(name, copied)
    return new


def deep_copy_of(value: nn.Module | Tensor) -> nn.Module | Tensor:
    """A copy of a module or tensor with memory of its own."""
    if isinstance(value, nn.Module):
        return deep_copy(value)
    copied = value.detach().clone()
    return nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied
