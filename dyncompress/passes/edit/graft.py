"""Heads written into a graph: one call, or operator by operator; and the exits read off a graph again.

Whatever computes the logits of an exit from the node it follows is its head. What only early answers need, the answers
of an earlier exit that a later one reads too, is the exits' part of the graph.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ...errors import RequestError
from ..capture.capture import capture
from ..capture.lift import device_of
from ..dims.type_graph import attribute
from ..exits.head_spec import ExitHead
from ..graph.copying import deep_copy
from .flow import Flow, remake


@dataclass(frozen=True)
class Exit:
    """An early exit of a graph: the node it follows, the nodes of its head in graph order, and its logits."""

    at: fx.Node
    nodes: tuple[fx.Node, ...]
    logits: fx.Node

    def module(self, gm: fx.GraphModule) -> ExitHead | None:
        """The head where it is a single module."""
        return _exit_head(gm, self.logits)


def graph_exits(gm: fx.GraphModule) -> list[Exit]:
    """The early exits of a graph.

    Raises:
        RequestError: it has none.
    """
    if not gm.meta.get("exits"):
        raise RequestError("the graph has no exits; run InsertExits on it first")
    found = []
    for name, logits in zip(gm.meta["exits"], all_logits(gm)[:-1], strict=True):
        at = _followed(gm, name, logits)
        nodes = _back_to(at, logits)
        found.append(Exit(at, tuple(n for n in gm.graph.nodes if n in nodes), logits))
    return found


def all_logits(gm: fx.GraphModule) -> list[fx.Node]:
    """The outputs of a graph with exits, early first, the final logits last."""
    return list(gm.graph.output_node().args[0])  # type: ignore[arg-type]


def _exit_head(gm: fx.GraphModule, call: fx.Node) -> ExitHead | None:
    module = gm.get_submodule(str(call.target)) if call.op == "call_module" else None
    return module if isinstance(module, ExitHead) else None


def _followed(gm: fx.GraphModule, name: str, logits: fx.Node) -> fx.Node:
    """What the exit with these logits follows: by its name, which a pass may have taken away from a single head's."""
    if _exit_head(gm, logits):
        return logits.all_input_nodes[0]
    found = next((node for node in gm.graph.nodes if node.name == name), None)
    if found is None:
        raise RequestError(f"the node {name}, which an exit followed, is gone: insert the exits after that pass")
    return found


def _back_to(at: fx.Node, logits: fx.Node) -> set[fx.Node]:
    """What lies between `at` and `logits`; parameters of it included."""
    found, queue = {logits}, [logits]
    while queue:
        for node in queue.pop().all_input_nodes:
            if node is not at and node not in found:
                found.add(node)
                queue.append(node)
    return found


def needed_for(outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything that these nodes are computed from, and they themselves."""
    found = set(outputs)
    queue = list(found)
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                queue.append(node)
    return found


def exit_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes of a graph with exits that its final answer does not need, but an early one does."""
    *early, final = all_logits(gm)
    return needed_for(early) - needed_for([final])


def exit_modules(gm: fx.GraphModule) -> set[str]:
    """The paths of the modules, parameters and buffers that only early answers need."""
    return {str(n.target) for n in exit_nodes(gm) if n.op in {"call_module", "get_attr"}}


# --- writing -----------------------------------------------------------------------------------------------------


def insert_head(gm: fx.GraphModule, path: str, head: nn.Module, inputs: tuple[fx.Node, ...], after: fx.Node) -> fx.Node:
    """Adds `head` as the modules below `path`, its call on `inputs` right after `after`; returns what it gives."""
    reference = next(gm.parameters())
    if isinstance(head, ExitHead):
        gm.add_submodule(path, head.to(reference.device, inputs[0].meta["val"].dtype).train(gm.training))
        shape = (inputs[0].meta["val"].shape[0], head.linear.out_features)
        with gm.graph.inserting_after(after):
            call = gm.graph.call_module(path, inputs)
        call.meta = {"val": inputs[0].meta["val"].new_empty(shape), "path": path}
        return call
    examples = tuple(torch.zeros(2, *n.meta["val"].shape[1:], dtype=n.meta["val"].dtype) for n in inputs)
    taken = capture(head.to(examples[0].dtype), examples)
    gm.add_submodule(path, container(taken).to(reference.device).train(gm.training))
    return inline(gm, path, taken, inputs, after)


def container(module: nn.Module) -> nn.Module:
    """A plain module that holds what another one holds; what is added to it, the other does not get."""
    plain = nn.Module()
    plain._modules, plain._parameters = dict(module._modules), dict(module._parameters)
    plain._buffers = dict(module._buffers)
    return plain


def inline(
    gm: fx.GraphModule, path: str, taken: fx.GraphModule, inputs: tuple[fx.Node, ...], after: fx.Node
) -> fx.Node:
    """Writes the operators of `taken`, whose modules are at `path`, after a node; returns its result."""
    placeholders = taken.graph.find_nodes(op="placeholder")
    copies: dict[fx.Node, fx.Node] = dict(zip(placeholders, inputs, strict=True))
    (result,) = taken.graph.output_node().all_input_nodes
    for node in taken.graph.nodes:
        if node.op in {"placeholder", "output"}:
            continue
        with gm.graph.inserting_after(after):
            after = copies[node] = gm.graph.node_copy(node, copies.__getitem__)
        if node.op in {"call_module", "get_attr"}:
            after.target = f"{path}.{node.target}"
        after.meta["path"] = f"{path}.{node.meta.get('path', '')}".rstrip(".")
    return copies[result]


# --- the model's own head ----------------------------------------------------------------------------------------


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
