"""Decisions of skip gates that are known before the first gated branch runs, read from the device all at once.

A policy network decides on all branches before the first (BlockDrop): which samples run which branch is then one read
for a whole stage, where a gate per branch needs a read each, and a GPU waits for each of them.
"""

import operator

import torch
from torch import Tensor, fx

from ...passes.gates.run_gated import GatedBranch, Rows


def use_one_read(piece: fx.GraphModule) -> None:
    """Rewrites, in place, a piece of a trunk in which two or more decisions are known before its first gated branch."""
    branches = [
        node for node in piece.graph.find_nodes(op="call_module")
        if isinstance(piece._modules.get(str(node.target)), GatedBranch)
    ]  # fmt: skip
    if not branches:
        return
    order = list(piece.graph.nodes)
    before = set(order[: order.index(branches[0])])
    early = [node for node in branches if before.issuperset(node.args[0].all_input_nodes)]
    if len(early) < 2:
        return
    opened = list(dict.fromkeys(node.args[0] for node in early))
    for decision in opened:
        branches[0].prepend(decision)
    with piece.graph.inserting_before(branches[0]):
        rows = piece.graph.call_function(read_rows, tuple(opened))
        each = {decision: piece.graph.call_function(operator.getitem, (rows, k)) for k, decision in enumerate(opened)}
    for node in early:
        node.update_arg(0, each[node.args[0]])
    piece.graph.lint()


def read_rows(*opened: Tensor) -> list[Rows]:
    """The samples that each of several decisions, (N,) bool, is open for."""
    decided = torch.stack(opened)
    if decided.shape[1] == 1:
        return [Rows(int(number)) for number in decided.flatten().tolist()]
    open_first = decided.byte().argsort(dim=1, descending=True, stable=True)
    numbers = decided.sum(1).tolist()
    return [Rows(number, places[:number]) for number, places in zip(numbers, open_first, strict=True)]
