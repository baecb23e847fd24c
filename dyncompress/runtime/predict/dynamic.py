"""The dynamic model: a graph with exits, skip gates or both, which does for each sample only what that sample needs."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from math import inf
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...errors import RequestError
from ...passes.graph.inputs import Inputs, split_inputs
from ...passes.graph.meta import exits_of, gates_of
from .arrivals import as_asked_for, as_they_come
from .deadline import Deadline
from .pieces import Pieces, Prediction
from .policy import ExitPolicy, OperatingPolicy, State, within_budget
from .predict_steps import Steps
from .sample_pool import Pools, run_stream

_BUILDING = Lock()


class DynamicModel(nn.Module):
    """A network with early exits, skip gates or both.

    Called in training mode it returns the tuple of every exit's (N, C) logits, early first, the model's own last; in
    evaluation mode the model's own logits only, without computing any head. `predict` leaves early. Where a gate is
    closed, its branch is not computed, except in training mode and by `all_logits`.

    Args:
        gm: a graph that `InsertExits` or `InsertGates` has run on; it becomes the child `trunk`.
        policy: decides who leaves where; None: nobody leaves early.
        table: policies for other budgets, for `predict(budget=...)`.

    Raises:
        RequestError: `gm` has neither exits nor gates, or a policy another number of exits.
    """

    def __init__(
        self, gm: fx.GraphModule, policy: ExitPolicy | None = None, table: Sequence[OperatingPolicy] = ()
    ) -> None:
        super().__init__()
        self.trunk = gm
        self.training = gm.training
        self._cached: Pieces | None = None
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
        other._cached = self._pieces()
        other.policy = policy
        return other

    @property
    def exits(self) -> list[str]:
        """The graph nodes that the early exits follow."""
        return list(exits_of(self.trunk))

    @property
    def gates(self) -> list[str]:
        """The residual branches that may be skipped, in graph order."""
        return [gate.branch for gate in gates_of(self.trunk)]

    @property
    def branch_macs(self) -> list[int]:
        """MACs per sample of each of `gates`."""
        return [macs for stage in self._pieces().stages for macs in stage.branch_macs]

    @property
    def num_classes(self) -> int:
        """The size of the last dim of the logits."""
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
        return self._pieces().static_macs

    @property
    def exit_macs(self) -> list[int]:
        """MACs per sample that leaves at each exit (the last entry: the end), every head on the way included."""
        return list(self._pieces().exit_macs((True,) * len(self.exits)))

    # --- running it ----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """Training: every exit's logits, each (N, C); evaluation: the final logits (N, C)."""
        if self.training:
            return self.trunk(*args, **kwargs)
        return self._pieces().static(*args, **kwargs)

    @torch.no_grad()
    def all_logits(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Every exit's (N, C) logits, early first, the final ones last; evaluation mode, no gradients."""
        pieces = self._pieces()
        if pieces.calls.read(args, kwargs)[1] == 0:
            return tuple(self._no_logits() for _ in range(len(self.exits) + 1))
        with pieces.evaluating:
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
        pieces = self._pieces()
        flat, n = pieces.calls.read(args, kwargs)
        policy = self._policy if budget is None else within_budget(self.table, budget)
        deadline = None if deadline_ms is None else Deadline(deadline_ms, next(self.trunk.parameters()).device)
        on = tuple([t is not None or deadline is not None for t in policy.thresholds])
        macs = pieces.exit_macs(on)
        if n == 0:
            logits = self._no_logits()
            nobody = torch.zeros(0, dtype=torch.int64, device=logits.device)
            return Prediction(logits, nobody, macs, pieces.count(0, logits.device))
        with pieces.evaluating:
            if any(on) or pieces.gated:
                device = next(x.device for x in flat if isinstance(x, Tensor))
                steps = Steps(pieces, on, policy, pieces.count(n, device), device)
                return Prediction(*self._run_stages(steps, flat, n, deadline), macs, steps.count)
            logits = pieces.static(*args, **kwargs)
        return Prediction(logits, torch.full((n,), len(on), device=logits.device), macs)

    def predict_stream(
        self, batches: Iterable[Inputs], *, max_batch: int = 64, max_wait_ms: float | None = None
    ) -> Iterator[Prediction]:
        """What `predict` answers to each batch, in order; the stages behind an exit run on samples of many batches.

        Args:
            batches: of any sizes, each what one call takes: a tensor, a tuple of positional inputs, a dict of keywords.
            max_batch: how many samples a stage waits for, and runs at once.
            max_wait_ms: how long after its arrival a sample may wait for others. `batches` are then read in a thread of
                their own, up to `max_batch` of them ahead. None: until the stages are full, or the stream ends.

        Raises:
            RequestError: wrong options; while answers are read, inputs that do not fit the model, after the answers to
                what came before.
        """
        if max_batch < 1:
            raise RequestError(f"max_batch is {max_batch}: give at least 1")
        if max_wait_ms is not None and not max_wait_ms >= 0:
            raise RequestError(f"max_wait_ms is {max_wait_ms}: give milliseconds, 0 or more")
        seconds = inf if max_wait_ms is None else max_wait_ms / 1000
        pieces = self._pieces()
        pools = Pools(pieces, self.policy, pieces.per_sample, self._no_logits(), max_batch, seconds)
        arrivals = as_asked_for(batches) if max_wait_ms is None else as_they_come(batches, pools.wait, max_batch)
        return run_stream(pools, arrivals, lambda batch: pieces.calls.read(*split_inputs(batch)))

    def compile(self, **options: Any) -> None:
        """Lets torch.compile compile every stage, every head and the static model, each when it first runs.

        For `predict`, `predict_stream` and calls in evaluation mode; training, copies and checkpoints are as before.
        Batches of any size run the same code, since samples leave.

        Args:
            options: of `torch.compile`, such as `mode` or `backend`.
        """
        self._cached = self._pieces().compiled(**{"dynamic": True, **options})

    def _run_stages(
        self, steps: Steps, values: Sequence[Any], n: int, deadline: Deadline | None
    ) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and exit index (N,); `rows` are the undecided samples' places in the batch, None: all."""
        run = steps.in_blocks if deadline is None else steps.at_once  # a deadline is for all samples
        stages, done_macs, k = steps.pieces.stages, 0, 0
        logits = exit_index = torch.empty(0)
        rows: Tensor | None = None
        state: State = ()
        while True:
            next_macs = n * (stages[k].macs + stages[k].head_macs)
            if deadline is not None and k > 0 and not deadline.allows(done_macs, next_macs):
                so_far = steps.policy.unsure(logits if rows is None else logits[rows], state, final=False)
                return so_far if rows is None else logits.index_copy(0, rows, so_far), exit_index
            k, z, stay, values, state = run(k, values, n, state, rows)
            done_macs += next_macs
            if rows is None:
                logits, exit_index = z, torch.full((n,), k, device=z.device)
            else:  # those who stay are overwritten later
                logits.index_copy_(0, rows, z.to(logits.dtype))
                exit_index.index_fill_(0, rows, k)
            if stay is not None:
                rows, n = stay if rows is None else rows.index_select(0, stay), len(stay)
                if n == 0:
                    return logits, exit_index
            k += 1

    def _no_logits(self) -> Tensor:
        return next(self.trunk.parameters()).new_empty((0, *self._answer.shape[1:]), requires_grad=False)

    # --- what is derived from the trunk --------------------------------------------------------------------------

    def _pieces(self) -> Pieces:
        """Derived once per trunk graph; not part of copies and pickles, which derive their own."""
        if self._cached is None or self._cached.graph is not self.trunk.graph:
            with _BUILDING:  # threads that come first share one
                if self._cached is None or self._cached.graph is not self.trunk.graph:
                    self._cached = Pieces(self.trunk)
        return self._cached

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}


def graph_of(model: fx.GraphModule | DynamicModel) -> fx.GraphModule:
    """The captured graph itself, or that of a dynamic model with its exits."""
    return model.trunk if isinstance(model, DynamicModel) else model
