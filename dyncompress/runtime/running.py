"""What a dynamic model runs, derived from its trunk's graph, and what it answers."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..passes.cost import count_macs
from ..passes.modes import evaluating
from ..passes.stages import Stage, split_stages, without_exits
from .inputs import CallReader


@dataclass(frozen=True)
class Prediction:
    """Per sample, in input order: logits (N, C) and the exit that gave them, (N,) int64 (the end is exit K).

    `exit_macs[k]` is what a sample that left at exit k cost with no branch skipped. Of a model with skip gates, `gates`
    (N, G) bool says which branches ran, in graph order, and `skipped` (N,) int64 the MACs of those that a sample
    came to and that did not; else both are None.
    """

    logits: Tensor
    exit_index: Tensor
    exit_macs: tuple[int, ...]
    gates: Tensor | None = None
    skipped: Tensor | None = None

    @property
    def macs(self) -> Tensor:
        """MACs spent per sample, (N,) int64."""
        spent = torch.tensor(self.exit_macs, device=self.exit_index.device)[self.exit_index]
        return spent if self.skipped is None else spent - self.skipped


class GateCount:
    """Counts, over the stages that run, which branches ran for each of N samples and what the others saved."""

    def __init__(self, n: int, branch_macs: Sequence[tuple[int, ...]], device: torch.device) -> None:
        self._first = [0, *accumulate(map(len, branch_macs))]
        self._macs = branch_macs
        self.gates = torch.zeros(n, self._first[-1], dtype=torch.bool, device=device)
        self.skipped = torch.zeros(n, dtype=torch.int64, device=device)

    def note(self, stage: int, opened: Sequence[Tensor], rows: Tensor | None) -> None:
        """The decisions of a stage, (M,) bool each, for the samples `rows`, None: all."""
        decided = torch.stack(tuple(opened), 1)
        saved = (~decided).long() @ torch.tensor(self._macs[stage], device=decided.device)
        here = slice(self._first[stage], self._first[stage + 1])
        if rows is None:
            self.gates[:, here] = decided
            self.skipped += saved
        else:
            self.gates[rows, here] = decided
            self.skipped.index_add_(0, rows, saved)

    def add(self, i: int, other: "GateCount", row: int) -> None:
        """What another count noted for its sample `row` goes to the sample `i`."""
        self.gates[i] |= other.gates[row]
        self.skipped[i] += other.skipped[row]


class Pieces:
    """One trunk graph as a static model and as stages; it holds no tensors of its own, and threads may share it.

    static: the model without its exits, static_macs its MACs per sample with no branch skipped. stages: one per exit
    and the last.
    """

    def __init__(self, trunk: fx.GraphModule) -> None:
        self.graph = trunk.graph
        self.static = without_exits(trunk)
        self.stages: list[Stage] = split_stages(trunk)
        self.static_macs = count_macs(self.static)
        self.calls = CallReader(trunk)
        self.evaluating = _Modes(trunk)
        for piece in (self.static, *(stage.body for stage in self.stages)):
            vars(piece)["trunk"] = trunk  # every node asks for it, and a child module is found by a call in Python
        self._macs: dict[tuple[bool, ...], tuple[int, ...]] = {}

    def compiled(self, **options: Any) -> "Pieces":
        """The same, each piece compiled by `torch.compile(piece, **options)` when it first runs."""

        def compiled(piece: nn.Module) -> Any:
            return torch.compile(piece, **options)

        made = copy.copy(self)
        made.static = compiled(self.static)
        made.stages = [replace(s, body=compiled(s.body), head=s.head and compiled(s.head)) for s in self.stages]
        return made

    def exit_macs(self, on: tuple[bool, ...]) -> tuple[int, ...]:
        """MACs per sample that leaves at each exit, the end last, when the heads of those that are `on` run."""
        if on not in self._macs:
            each = [s.macs + computed * s.head_macs for s, computed in zip(self.stages, [*on, False], strict=True)]
            self._macs[on] = tuple(accumulate(each))
        return self._macs[on]

    @property
    def gated(self) -> bool:
        """Whether there are skip gates."""
        return any(stage.branch_macs for stage in self.stages)

    def count(self, n: int, device: torch.device) -> GateCount | None:
        """What counts the gates of `n` samples, where there are any."""
        return GateCount(n, [stage.branch_macs for stage in self.stages], device) if self.gated else None

    def run_to_exit(
        self, k: int, values: Sequence[Any], on: tuple[bool, ...], count: GateCount | None, rows: Tensor | None
    ) -> tuple[int, Tensor, Sequence[Any]]:
        """Runs stage `k` and those behind it through the first exit that is on, or to the end.

        The decisions of skip gates go to `count`, whose samples `rows` these are, None: all. Returns the exit's number,
        its logits (M, C) and the `outputs` of its stage.
        """
        while True:
            stage = self.stages[k]
            values = stage.body(*values)
            if count is not None and stage.branch_macs:
                count.note(k, values[len(stage.outputs) :], rows)
                values = values[: len(stage.outputs)]
            if stage.head is None or on[k]:
                z = values[stage.outputs.index(stage.at)]
                return k, z if stage.head is None else stage.head(z), values
            k += 1


class _Modes:
    """Evaluation mode for a while: the first thread in sets it, the last one out restores every module's own mode."""

    def __init__(self, trunk: nn.Module) -> None:
        self._trunk = trunk
        self._lock = Lock()
        self._inside = 0
        self._restored: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0 and self._trunk.training:  # a model that evaluates already is not walked through
                self._restored = evaluating(self._trunk)
                self._restored.__enter__()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._restored is not None:
                self._restored.__exit__(None, None, None)
                self._restored = None
