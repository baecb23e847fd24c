"""Gated branches as they run: computed for the samples whose gate is open, and not at all where it is closed for all.

total = shortcut + branch * open     becomes     total[open] = shortcut[open] + branch(what enters it [open])
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ..edit.analysis import Analysis
from ..edit.flow import like
from ..edit.sample_rows import add_rows_, take_rows
from ..graph.aliasing import aliases, is_fresh, overwritten
from ..graph.rewriter import Rewriter
from .read_gates import Gate

Body = Callable[[Sequence[fx.Node], Sequence[fx.Node], Sequence[fx.Node]], fx.GraphModule]


class Rows(NamedTuple):
    """How many samples of a batch a gate is open for, and their places, (number,) int64; None for a batch of one."""

    number: int
    places: Tensor | None = None


def rows_of(opened: Tensor) -> Rows:
    """Decisions (N,) bool, read from the device."""
    if opened.shape[0] == 1:
        return Rows(int(opened.item()))
    places = opened.nonzero().flatten()
    return Rows(places.shape[0], places)


class GatedBranch(nn.Module):
    """Adds a branch to the samples whose gate is open.

    `body` takes what enters the branch and returns a tuple of its result; `per_sample` says which of it have one row
    per sample. `copied`: what comes out is written to later, so that it may not be the shortcut itself. `spent`: nobody
    reads the shortcut afterwards; `fresh`: the result's memory is its own. Where no gradient will want their values,
    sums are then written there. `macs_per_sample` are those of a sample whose gate is open.
    """

    def __init__(
        self, body: fx.GraphModule, per_sample: Sequence[bool], copied: bool, spent: bool, fresh: bool,
        macs_per_sample: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.body, self.per_sample, self.copied = body, list(per_sample), copied
        self.spent, self.fresh = spent, fresh
        self.macs_per_sample = macs_per_sample

    def forward(self, opened: Tensor | Rows, shortcut: Tensor, *entering: Tensor) -> Tensor:
        """`opened` (N,) bool, or what was read of it; the rest (N, ...) where per sample."""
        number, rows = opened if isinstance(opened, Rows) else rows_of(opened)
        if number == 0:
            return shortcut.clone() if self.copied and not self.spent else shortcut
        in_place = not torch.is_grad_enabled()
        if rows is None or number == shortcut.shape[0]:
            added = self.body.forward(*entering)[0]
            same = self.fresh and in_place and added.dtype == shortcut.dtype
            return added.add_(shortcut) if same else shortcut + added
        taken = [take_rows(x, rows) if own else x for x, own in zip(entering, self.per_sample, strict=True)]
        added = self.body.forward(*taken)[0].to(shortcut.dtype)
        return add_rows_(shortcut if self.spent and in_place else shortcut.clone(), rows, added)


class Skipping:
    """Copies a graph node by node, each gated branch as one call of a `GatedBranch`.

    Args:
        known: of the graph.
        gates: whose branches are to be skipped; none: everything is copied as it is.
        body: makes a module of (inputs, nodes, outputs) of the graph.
    """

    def __init__(self, known: Analysis, gates: list[Gate], body: Body) -> None:
        self.known, self.gates, self._body = known, gates, body
        self._at = {gate.total: gate for gate in gates}
        self._inside = {node for gate in gates for node in (*gate.nodes, *gate.scale)}

    def copy(self, rewriter: Rewriter, owner: nn.Module, node: fx.Node) -> None:
        """Copies a node; what runs a branch becomes a module of `owner`."""
        if node in self._at:
            rewriter.copies[node] = self._call(rewriter, owner, self._at[node])
        elif node not in self._inside:
            rewriter.copy(node)

    def branch_macs(self, gate: Gate) -> int:
        """MACs per sample of what a closed gate skips."""
        return sum(self.known.macs[n] for n in gate.nodes)

    def _call(self, rewriter: Rewriter, owner: nn.Module, gate: Gate) -> fx.Node:
        entering = self.known.flow.entering(gate.nodes)
        per_sample = [self.known.flow.per_sample(n) for n in entering]
        body = self._body(entering, gate.nodes, (gate.end,))
        args = tuple(rewriter.fetch(n) for n in (gate.open, gate.shortcut, *entering))
        spent = args[1].op != "placeholder" and self._spent(gate)
        fresh = is_fresh(self.known.gm, gate.end)
        module = GatedBranch(body, per_sample, overwritten(gate.total), spent, fresh, self.branch_macs(gate))
        name = f"branch_{self.gates.index(gate)}"
        owner.add_module(name, module)
        return like(gate.total, rewriter.graph.create_node("call_module", name, args, name=gate.total.name))

    def _spent(self, gate: Gate) -> bool:
        """Whether nothing that is computed after a gated sum reads the memory of its shortcut."""
        shortcut, order = gate.shortcut, self.known.flow.order
        before = self._at.get(shortcut)  # a gated sum too, which may be its own shortcut
        own = self._spent(before) if before is not None else is_fresh(self.known.gm, shortcut)
        viewed = any(arg is shortcut for user in shortcut.users for arg, _ in aliases(user))
        return own and not viewed and all(order[user] <= order[gate.total] for user in shortcut.users)
