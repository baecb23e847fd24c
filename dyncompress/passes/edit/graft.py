"""Heads written into a graph: as one call, or operator by operator."""

import torch
from torch import fx, nn

from ..capture.capture import capture
from ..graph.module_tree import sharing
from ..graph.rewriter import Rewriter
from ..modules.exit_heads import ExitHead


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
    gm.add_submodule(path, sharing(taken).to(reference.device).train(gm.training))
    return inline(gm, path, taken, inputs, after)


def inline(
    gm: fx.GraphModule, path: str, taken: fx.GraphModule, inputs: tuple[fx.Node, ...], after: fx.Node
) -> fx.Node:
    """Writes the operators of `taken`, whose modules are at `path`, after a node; returns its result."""
    placeholders = taken.graph.find_nodes(op="placeholder")
    rewriter = Rewriter(gm.graph, below=path)
    rewriter.copies.update(zip(placeholders, inputs, strict=True))
    (result,) = taken.graph.output_node().all_input_nodes
    for node in taken.graph.nodes:
        if node.op in {"placeholder", "output"}:
            continue
        with gm.graph.inserting_after(after):
            after = rewriter.copy(node)
        after.meta["path"] = f"{path}.{node.meta.get('path', '')}".rstrip(".")
    return rewriter.copies[result]
