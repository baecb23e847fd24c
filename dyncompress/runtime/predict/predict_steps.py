"""One step of `predict`: all undecided samples run to the next exit that is on, and those that are sure leave."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...passes.edit.sample_rows import take_rows
from .pieces import GateCount, Pieces
from .policy import ExitPolicy, State


class Step(NamedTuple):
    """Exit `k` answered `logits` (M, C). `stay`: places of those that go on among the M samples, None: all of them.

    The next stage takes `values` of them, the policy remembers `state`. Nobody stays after the end.
    """

    k: int
    logits: Tensor
    stay: Tensor | None
    values: Sequence[Any] = ()
    state: State = ()


@dataclass(frozen=True, slots=True)
class Steps:
    """What all steps of a call have in common: the decisions of skip gates go to `count`."""

    pieces: Pieces
    on: tuple[bool, ...]
    policy: ExitPolicy
    count: GateCount | None
    device: torch.device

    def at_once(self, k: int, values: Sequence[Any], n: int, state: State, rows: Tensor | None) -> Step:
        """From stage `k` on, with `n` samples, whose places in the batch are `rows`, None: all."""
        k, z, values = self.pieces.run_to_exit(k, values, self.on, self.count, rows)
        if k == len(self.on):
            return Step(k, self.policy.unsure(z, state), self._nobody)
        leaves, state = self.policy.decide(k, z, state)
        if n == 1:  # nothing to gather
            return Step(k, z, self._nobody) if leaves.item() else Step(k, z, None, values, state)
        stay = torch.nonzero(~leaves).flatten()
        if len(stay) == n:
            return Step(k, z, None, values, state)
        if len(stay) == 0:
            return Step(k, z, stay)
        owned = self.pieces.stages[k].per_sample
        values = [take_rows(x, stay) if own else x for x, own in zip(values, owned, strict=True)]
        return Step(k, z, stay, values, tuple(remembered.index_select(0, stay) for remembered in state))

    def in_blocks(self, k: int, values: Sequence[Any], n: int, state: State, rows: Tensor | None) -> Step:
        """The same, a block of samples after the other (`cache_blocks`); those that stay go on together."""
        parts = self.pieces.blocks(k, n, self.on, self.device)
        if len(parts) == 1:
            return self.at_once(k, values, n, state, rows)
        owned = self.pieces.per_sample if k == 0 else self.pieces.stages[k - 1].per_sample
        everybody = torch.arange(n, device=self.device)
        places = everybody if rows is None else rows
        done = []
        for part in parts:
            own = [x[part] if mine else x for x, mine in zip(values, owned, strict=True)]
            own_state = tuple(remembered[part] for remembered in state)
            done.append(self.at_once(k, own, part.stop - part.start, own_state, places[part]))
        k, z = done[0].k, torch.cat([step.logits for step in done])
        stay = torch.cat(
            [everybody[p] if d.stay is None else d.stay + p.start for p, d in zip(parts, done, strict=True)]
        )
        going = [step for step in done if step.stay is None or len(step.stay)]
        if not going:
            return Step(k, z, stay)
        outputs = zip(self.pieces.stages[k].per_sample, *(step.values for step in going), strict=True)
        values = [torch.cat(each) if own else each[0] for own, *each in outputs]
        state = tuple(torch.cat(each) for each in zip(*(step.state for step in going), strict=True))
        return Step(k, z, None if len(stay) == n else stay, values, state)

    @property
    def _nobody(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device=self.device)
