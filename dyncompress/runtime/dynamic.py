"""The dynamic model: a graph with exits that answers each sample at the first exit that is sure of it."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import RequestError
from ..passes.cost import count_macs
from ..passes.modes import evaluating
from ..passes.stages import Stage, split_stages, without_exits
from .deadline import Deadline
from .inputs import batch_size, flat_inputs
from .policy import ExitPolicy, OperatingPolicy, State, within_budget


@dataclass(frozen=True)
class Prediction:
    """Per sample, in input order: logits (N, C) and the exit that gave them, (N,) int64 (the end is exit K).

    `exit_macs[k]` is what a sample that left at exit k cost.
    """

    logits: Tensor
    exit_index: Tensor
    exit_macs: tuple[int, ...]

    @property
    def macs(self) -> Tensor:
        """MACs spent per sample, (N,) int64."""
        return torch.tensor(self.exit_macs, device=self.exit_index.device)[self.exit_index]


@dataclass(frozen=True)
class _Pieces:
    """What is derived from one trunk graph; it holds no tensors of its own."""

    graph: fx.Graph
    static: fx.GraphModule
    stages: list[Stage]
    costs: dict[tuple[bool, ...], tuple[int, ...]]  # MACs of leaving at each exit, by which exits are on


class DynamicModel(nn.Module):
    """A network with early exits.

    Called in training mode it returns the tuple of every exit's (N, C) logits, early first, the model's own last; in
    evaluation mode the model's own logits only, without computing any head. `predict` leaves early.

    Args:
        gm: a graph that `InsertExits` has run on; it becomes the child `trunk`.
        policy: decides who leaves where; None: nobody leaves early.
        table: policies for other budgets, for `predict(budget=...)`.

    Raises:
        RequestError: `gm` has no exits, or a policy another number of them.
    """

    def __init__(
        self, gm: fx.GraphModule, policy: ExitPolicy | None = None, table: Sequence[OperatingPolicy] = ()
    ) -> None:
        super().__init__()
        self.trunk = gm
        self.training = gm.training
        self._cached: _Pieces | None = None
        self._pieces()
        self.policy = policy or ExitPolicy.never(len(self.exits))
        self.table = tuple(table)

    # --- what it is ----------------------------------------------------------------------------------------------

    @property
    def policy(self) -> ExitPolicy:
        """Who leaves where; may be set at any time."""
        return self._policy

    @policy.setter
    def policy(self, policy: ExitPolicy) -> None:
        self._check(policy)
        self._policy = policy

    @property
    def table(self) -> tuple[OperatingPolicy, ...]:
        """Policies for other budgets; may be set at any time."""
        return self._table

    @table.setter
    def table(self, table: Sequence[OperatingPolicy]) -> None:
        for row in table:
            self._check(row.policy)
        self._table = tuple(table)

    def _check(self, policy: ExitPolicy) -> None:
        if len(policy.thresholds) != len(self.exits):
            raise RequestError(
                f"the policy has {len(policy.thresholds)} thresholds, the model {len(self.exits)} early exits"
            )
        if self.per_position and any(policy.is_on(k) for k in range(len(policy.thresholds))):
            raise RequestError(
                "the model answers at every position and a sample leaves as a whole, so that no exit can be on: "
                "positions that stay still need the states of those that would leave"
            )

    def with_policy(self, policy: ExitPolicy) -> "DynamicModel":
        """The same model, sharing the trunk, under another policy."""
        other = copy.copy(self)
        other._cached = self._cached
        other.policy = policy
        return other

    @property
    def exits(self) -> list[str]:
        """The graph nodes that the early exits follow."""
        return list(self.trunk.meta.get("exits", []))

    @property
    def num_classes(self) -> int:
        return self._answer.shape[-1]

    @property
    def per_position(self) -> bool:
        """Whether the logits are (N, T, C), as a language model's, instead of (N, C)."""
        return self._answer.dim() == 3

    @property
    def _answer(self) -> Tensor:
        """The final logits at capture, without values."""
        return self.trunk.graph.output_node().args[0][-1].meta["val"]  # type: ignore[index, union-attr]

    @property
    def static_macs(self) -> int:
        """MACs per sample of the model without exits."""
        return count_macs(self._pieces().static)

    @property
    def exit_macs(self) -> list[int]:
        """MACs per sample that leaves at each exit (the last entry: the end), every head on the way included."""
        return list(self._exit_macs((True,) * len(self.exits)))

    def _exit_macs(self, on: tuple[bool, ...]) -> tuple[int, ...]:
        pieces = self._pieces()
        if on not in pieces.costs:
            each = [s.macs + computed * s.head_macs for s, computed in zip(pieces.stages, [*on, False], strict=True)]
            pieces.costs[on] = tuple(accumulate(each))
        return pieces.costs[on]

    # --- running it ----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """Training: every exit's logits, each (N, C); evaluation: the final logits (N, C)."""
        if self.training:
            return self.trunk(*args, **kwargs)
        return self._pieces().static(*args, **kwargs)

    @torch.no_grad()
    def all_logits(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Every exit's (N, C) logits, early first, the final ones last; evaluation mode, no gradients."""
        flat = flat_inputs(self.trunk, args, kwargs)
        if batch_size(self.trunk, flat) == 0:
            return tuple(self._no_logits() for _ in range(len(self.exits) + 1))
        with self._evaluating():
            return self.trunk(*args, **kwargs)

    @torch.no_grad()
    def predict(
        self, *args: Any, budget: float | None = None, deadline_ms: float | None = None, **kwargs: Any
    ) -> Prediction:
        """Answers every sample at its first sure exit; what comes after an exit runs on the undecided samples only.

        Called like the model itself, with any batch size. Evaluation mode, no gradients.

        Args:
            budget: mean MACs per sample, which the policy is looked up for in `table`; None: the model's own policy.
            deadline_ms: answer with the best so far rather than begin a stage that would end later, counted from the
                call. The first stage always runs, and every head, since any may be the last.

        Raises:
            RequestError: the inputs do not fit the model, the table has nothing for the budget, a wrong deadline.
        """
        flat = flat_inputs(self.trunk, args, kwargs)
        policy = self.policy if budget is None else within_budget(self.table, budget)
        deadline = None if deadline_ms is None else Deadline(deadline_ms, next(self.trunk.parameters()).device)
        on = tuple(deadline is not None or policy.is_on(k) for k in range(len(policy.thresholds)))
        macs = self._exit_macs(on)
        if batch_size(self.trunk, flat) == 0:
            logits = self._no_logits()
            return Prediction(logits, torch.zeros(0, dtype=torch.int64, device=logits.device), macs)
        with self._evaluating():
            if any(on):
                return Prediction(*self._run_stages(flat, policy, deadline), macs)
            logits = self._pieces().static(*args, **kwargs)
        return Prediction(logits, torch.full((len(logits),), len(on), device=logits.device), macs)

    def _run_stages(self, values: list[Any], policy: ExitPolicy, deadline: Deadline | None) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and exit index (N,); `rows` are the undecided samples' places in the batch, None: all."""
        logits = exit_index = torch.empty(0)
        rows: Tensor | None = None
        state: State = ()
        done_macs = 0
        for k, stage in enumerate(self._pieces().stages):
            if deadline is not None and k > 0:
                left = len(logits) if rows is None else len(rows)
                if not deadline.allows(done_macs, left * (stage.macs + stage.head_macs)):
                    break
            values = list(stage.body(*values))
            z = values[stage.outputs.index(stage.at)]
            if stage.head is not None:
                if deadline is None and not policy.is_on(k):
                    continue
                z = stage.head(z)
            done_macs += len(z) * (stage.macs + stage.head_macs)
            if rows is None:
                logits, exit_index = z, torch.full((len(z),), k, device=z.device)
            else:  # those who stay are overwritten later
                logits.index_copy_(0, rows, z.to(logits.dtype))
                exit_index.index_fill_(0, rows, k)
            if stage.head is None:
                break
            leaves, state = policy.decide(k, z, state)
            stay = torch.nonzero(~leaves).flatten()
            if len(stay) == 0:
                break
            if len(stay) == len(z):
                continue
            rows = stay if rows is None else rows.index_select(0, stay)
            state = tuple(remembered.index_select(0, stay) for remembered in state)
            values = [
                value.index_select(0, stay) if compact else value
                for value, compact in zip(values, stage.per_sample, strict=True)
            ]
        return logits, exit_index

    def _evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode for a while; a model that is in it already is not walked through."""
        return evaluating(self.trunk) if self.training or self.trunk.training else nullcontext()

    def _no_logits(self) -> Tensor:
        return next(self.trunk.parameters()).new_empty((0, *self._answer.shape[1:]), requires_grad=False)

    # --- what is derived from the trunk --------------------------------------------------------------------------

    def _pieces(self) -> _Pieces:
        """Derived once per trunk graph; not part of copies and pickles, which derive their own."""
        if self._cached is None or self._cached.graph is not self.trunk.graph:
            self._cached = _Pieces(self.trunk.graph, without_exits(self.trunk), split_stages(self.trunk), {})
        return self._cached

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}
