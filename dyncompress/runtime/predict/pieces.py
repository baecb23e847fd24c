"""What a dynamic model runs, derived from its trunk's graph, and what it answers."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...passes.exits.stages import Stage, StagedTrunk
from ...passes.gates.run_gated import GatedBranch
from ...passes.graph.inputs import CallReader
from ...passes.graph.meta import inputs_of
from ...passes.graph.restoring import evaluating
from .batched_decisions import use_one_read
from .cache_blocks import blocks, largest_value_bytes
from .fast_graph import make_lean


class GateCount:
    """Which branches ran for each of `n` samples, noted stage by stage and worked out when somebody asks."""

    def __init__(self, n: int, branch_macs: Sequence[tuple[int, ...]], device: torch.device) -> None:
        self._n, self._device, self._macs = n, device, branch_macs
        self._noted: list[tuple[int, Sequence[Tensor], Tensor | None]] = []

    def note(self, stage: int, opened: Sequence[Tensor], rows: Tensor | None) -> None:
        """The decisions of a stage, (M,) bool each, for the samples `rows`, None: all."""
        self._noted.append((stage, opened, rows))

    @cached_property
    def result(self) -> tuple[Tensor, Tensor]:
        """Which branches ran, (N, G) bool, and the MACs of those a sample came to that did not, (N,) int64."""
        first = [0, *accumulate(map(len, self._macs))]
        gates = torch.zeros(self._n, first[-1], dtype=torch.bool, device=self._device)
        skipped = torch.zeros(self._n, dtype=torch.int64, device=self._device)
        for stage, opened, rows in self._noted:
            decided = torch.stack(tuple(opened), 1)
            where = torch.arange(self._n, device=self._device) if rows is None else rows
            gates[where, first[stage] : first[stage + 1]] = decided
            saved = (~decided).long() * torch.tensor(self._macs[stage], device=self._device)
            skipped.index_add_(0, where, saved.sum(1))
        return gates, skipped

    def add(self, i: int, other: "GateCount", row: int) -> None:
        """What another count noted for its sample `row` goes to the sample `i`."""
        here = torch.tensor([i], device=self._device)
        self._noted += [(stage, [o[row : row + 1] for o in opened], here) for stage, opened, _ in other._noted]


@dataclass(frozen=True)
class Prediction:
    """Per sample, in input order: logits (N, C) and the exit that gave them, (N,) int64 (the end is exit K).

    `exit_macs[k]` is what a sample that left at exit k cost with no branch skipped; `count` is that of a model with
    skip gates.
    """

    logits: Tensor
    exit_index: Tensor
    exit_macs: tuple[int, ...]
    count: GateCount | None = None

    @property
    def gates(self) -> Tensor | None:
        """Which branches ran, in graph order, (N, G) bool; None without skip gates."""
        return None if self.count is None else self.count.result[0]

    @property
    def skipped(self) -> Tensor | None:
        """MACs of the branches that a sample came to and that did not run, (N,) int64; None without skip gates."""
        return None if self.count is None else self.count.result[1]

    @property
    def macs(self) -> Tensor:
        """MACs spent per sample, (N,) int64."""
        spent = torch.tensor(self.exit_macs, device=self.exit_index.device)[self.exit_index]
        return spent if self.skipped is None else spent - self.skipped


class Pieces:
    """One trunk graph as a static model and as stages; it holds no tensors of its own, and threads may share it.

    static: the model without its exits, static_macs its MACs per sample with no branch skipped. stages: one per exit
    and the last; `gated`: some branches have skip gates, and `branch_macs` are theirs by stage.
    """

    def __init__(self, trunk: fx.GraphModule) -> None:
        self.graph = trunk.graph
        staged = StagedTrunk(trunk)
        self.stages: list[Stage] = staged.stages
        self.static, self.static_macs = staged.static, staged.static_macs
        self.calls = CallReader(trunk)
        self._bytes = [largest_value_bytes(stage.body, inputs_of(trunk)) for stage in self.stages]
        self.per_sample = [given.per_sample for given in inputs_of(trunk)]
        self.evaluating = _Modes(trunk)
        for piece in (self.static, *(stage.body for stage in self.stages)):
            for module in piece.children():
                if isinstance(module, GatedBranch):
                    vars(module.body)["trunk"] = trunk
                    make_lean(module.body)
            use_one_read(piece)
            make_lean(piece)
            vars(piece)["trunk"] = trunk  # every node asks for it, and a child module is found by a call in Python
        self.branch_macs = [stage.branch_macs for stage in self.stages]
        self.gated = any(self.branch_macs)
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

    def blocks(self, k: int, n: int, on: tuple[bool, ...], device: torch.device) -> list[slice]:
        """In which parts `n` samples had better run from stage `k` to the next exit that is on."""
        end = next((j for j in range(k, len(on)) if on[j]), len(on))
        return blocks(n, max(self._bytes[k : end + 1]), device)

    def count(self, n: int, device: torch.device) -> GateCount | None:
        """What counts the gates of `n` samples, where there are any."""
        return GateCount(n, self.branch_macs, device) if self.gated else None

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
