"""A copy of the model's own last layers, reading an earlier node: the head "copy"."""

import torch
from torch import Tensor, fx, nn

from ...errors import RequestError
from ..capture.lift import device_of
from ..graph.copying import deep_copy
from ..graph.module_tree import holder_at, put_module, put_tensor
from ..graph.nodes import attribute
from ..graph.rewriter import Rewriter
from ..graph.walk import upstream
from .flow import Flow, remake


def copy_tail(gm: fx.GraphModule, path: str, flow: Flow, source: fx.Node, logits: fx.Node, at: fx.Node) -> fx.Node:
    """Adds a copy, with parameters of its own below `path`, of what leads from `source` to `logits`, reading `at`.

    Raises:
        RequestError: it reads anything else.
    """
    tail = _tail(flow, source, logits)
    gm.add_submodule(path, nn.Module())
    end = at

    def make(node: fx.Node) -> fx.Node:
        nonlocal end
        remade = node in flow.remade
        if not (remade and node.target in {device_of, torch.ops.aten.sym_size.int}):  # those read `at` instead
            for needed in node.all_input_nodes:
                rewriter.fetch(needed)
        with gm.graph.inserting_after(end):
            end = remake(gm.graph, node, at, rewriter.fetch) if remade else gm.graph.node_copy(node, rewriter.fetch)
        if end.op in {"call_module", "get_attr"}:
            end.target = _copy_attribute(gm, path, str(node.target))
            end.meta["path"] = end.target
        return end

    rewriter = Rewriter(gm.graph, missing=make)
    rewriter.copies[source] = at
    for node in tail:
        rewriter.fetch(node)
    return rewriter.copies[logits]


def _tail(flow: Flow, source: fx.Node, logits: fx.Node) -> list[fx.Node]:
    needed = upstream([logits])
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
    parent, _, name = new.rpartition(".")
    holder = holder_at(gm, parent)
    if name in holder._modules or name in holder._parameters or name in holder._buffers:
        return new  # called twice
    copied = deep_copy_of(attribute(gm, target))
    if isinstance(copied, nn.Module):
        put_module(gm, new, copied)
    else:
        put_tensor(gm, new, copied)
    return new


def deep_copy_of(value: nn.Module | Tensor) -> nn.Module | Tensor:
    """A copy of a module or tensor with memory of its own."""
    if isinstance(value, nn.Module):
        return deep_copy(value)
    copied = value.detach().clone()
    return nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied
