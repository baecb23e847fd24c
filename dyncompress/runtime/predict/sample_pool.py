"""Samples of many batches wait together, so that the stages behind an exit run on full batches.

    batch -> pool -> stages to the first live exit -> who stays -> pool -> stages to the next -> ... -> the end

1. A pool of `max_batch` samples runs; of several the deepest. What a run hands on then meets fewer than `max_batch`
   samples there, so that no pool between stages ever holds twice as many; and answers come early.
2. A sample that arrived `max_wait_ms` ago takes those of its pool along at once, and waits no more further on. Where
   batches come faster than they are answered this is `predict` on whatever has come, up to `max_batch` samples.
3. At the end of the stream, pools that are not full are emptied from the front, so that those who stay still meet.

Only samples of equal shapes share a pool, and only where the values without a batch that cross the cut (masks, rotary
tables, lengths) are equal too. The memory of a rule goes along with its sample.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import inf
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ...passes.edit.sample_rows import take_rows
from ...passes.graph.inputs import Inputs
from .arrivals import Arrival
from .pieces import GateCount, Pieces, Prediction
from .policy import ExitPolicy, State


@dataclass(eq=False)
class _Request:
    """One batch of the user's, and the answers to its samples so far."""

    arrived: float
    logits: list[Tensor]
    exits: list[int]
    count: GateCount | None
    missing: int


Tickets = list[tuple[_Request, int]]  # whose sample it is, and which of the batch


class _Group:
    """Samples at one place: the values there, the memory of the rule, and whose they are."""

    def __init__(self, values: Sequence[Any], per_sample: list[bool], state: State, tickets: Tickets) -> None:
        self.values, self.per_sample, self.state, self.tickets = values, per_sample, state, tickets
        self.arrived = min(request.arrived for request, _ in tickets)

    def __len__(self) -> int:
        return len(self.tickets)

    def part(self, begin: int, end: int) -> "_Group":
        """Neighbouring samples; nothing is copied."""
        return self._picked(lambda v: v[begin:end], self.tickets[begin:end])

    def select(self, rows: Sequence[int]) -> "_Group":
        """Any of the samples."""
        on = next(v for v, own in zip(self.values, self.per_sample, strict=True) if own).device
        index = torch.tensor(rows, device=on)
        return self._picked(lambda v: take_rows(v, index), [self.tickets[row] for row in rows])

    def _picked(self, pick: Callable[[Tensor], Tensor], tickets: Tickets) -> "_Group":
        values = [pick(v) if own else v for v, own in zip(self.values, self.per_sample, strict=True)]
        return _Group(values, self.per_sample, tuple(map(pick, self.state)), tickets)

    def fits(self, other: "_Group") -> bool:
        """Whether both can run in one batch."""
        return all(
            _same_shape(a, b) if own else _equal(a, b)
            for a, b, own in zip(self.values, other.values, self.per_sample, strict=True)
        )

    @staticmethod
    def joined(groups: list["_Group"]) -> "_Group":
        """All samples of groups that fit each other."""
        first = groups[0]
        if len(groups) == 1:
            return first
        each = zip(zip(*(g.values for g in groups), strict=True), first.per_sample, strict=True)
        values = [torch.cat(parts) if own else parts[0] for parts, own in each]
        state = tuple(torch.cat(parts) for parts in zip(*(g.state for g in groups), strict=True))
        return _Group(values, first.per_sample, state, [ticket for g in groups for ticket in g.tickets])


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return a.shape[1:] == b.shape[1:] and a.dtype == b.dtype


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a is b or (a.dtype == b.dtype and torch.equal(a, b))
    return bool(a == b)


class _Pool:
    """Groups that wait for the same stage and fit each other; never without any."""

    def __init__(self, stage: int, group: _Group) -> None:
        self.stage, self.groups, self.count = stage, deque([group]), len(group)

    @property
    def arrived(self) -> float:
        """When the sample that has been on its way longest came."""
        return min(group.arrived for group in self.groups)

    def put(self, group: _Group) -> None:
        self.groups.append(group)
        self.count += len(group)

    def take(self, most: int) -> _Group:
        """The first samples, up to `most` of them."""
        taken, room = [], min(most, self.count)
        self.count -= room
        while room:
            group = self.groups.popleft()
            if len(group) > room:
                self.groups.appendleft(group.part(room, len(group)))
                group = group.part(0, room)
            taken.append(group)
            room -= len(group)
        return _Group.joined(taken)


class Pools:
    """The samples on their way through one model under one policy.

    Args:
        pieces: of the model.
        policy: who leaves where.
        per_sample: which of the model's flat inputs have one row per sample.
        nothing: the logits of no sample.
        max_batch: samples that a stage waits for, and runs at once.
        max_wait: seconds after its arrival in which a sample may wait for others.
    """

    def __init__(
        self, pieces: Pieces, policy: ExitPolicy, per_sample: list[bool], nothing: Tensor,
        max_batch: int, max_wait: float,
    ) -> None:  # fmt: skip
        self._pieces, self._policy, self._nothing = pieces, policy, nothing
        self._max_batch, self._max_wait = max_batch, max_wait
        self._on = tuple(policy.is_on(k) for k in range(len(policy.thresholds)))
        self._macs = pieces.exit_macs(self._on)
        self._per_sample = [per_sample, *(stage.per_sample for stage in pieces.stages)]
        self._pools: list[_Pool] = []
        self._requests: deque[_Request] = deque()

    def add(self, flat: list[Any], n: int, arrived: float) -> None:
        """Takes in a batch of `n` samples that came at that time."""
        request = _Request(arrived, [self._nothing] * n, [0] * n, self._pieces.count(n, self._nothing.device), n)
        self._requests.append(request)
        if n:
            whole = _Group(flat, self._per_sample[0], (), [(request, i) for i in range(n)])
            for begin in range(0, n, self._max_batch):
                self._put(0, whole.part(begin, begin + self._max_batch))

    def wait(self) -> float | None:
        """Seconds until some sample has waited long enough; None where none will."""
        if not self._pools or self._max_wait == inf:
            return None
        return max(0.0, min(pool.arrived for pool in self._pools) + self._max_wait - perf_counter())

    def run_ready(self, *, more: bool) -> Iterator[Prediction]:
        """Runs what has waited long enough or is full; `more`: batches are at hand, which the first pool waits for."""
        while (pool := self._overdue(more) or self._full()) is not None:
            self._run(pool)
            yield from self._answered()
        yield from self._answered()

    def run_all(self) -> Iterator[Prediction]:
        """Runs everything that waits, from the front."""
        while self._pools:
            self._run(self._full() or min(self._pools, key=lambda pool: pool.stage))
            yield from self._answered()
        yield from self._answered()

    def _overdue(self, more: bool) -> _Pool | None:
        before = perf_counter() - self._max_wait
        late = [p for p in self._pools if p.arrived <= before and not (more and p.stage == 0)]
        return min(late, key=lambda pool: pool.arrived, default=None)

    def _full(self) -> _Pool | None:
        full = [pool for pool in self._pools if pool.count >= self._max_batch]
        return max(full, key=lambda pool: pool.stage, default=None)

    def _put(self, stage: int, group: _Group) -> None:
        for pool in self._pools:
            if pool.stage == stage and pool.groups[0].fits(group):
                return pool.put(group)
        return self._pools.append(_Pool(stage, group))

    @torch.no_grad()
    def _run(self, pool: _Pool) -> None:
        """One batch of a pool, through the next live exit."""
        group = pool.take(self._max_batch)
        if pool.count == 0:
            self._pools.remove(pool)
        with self._pieces.evaluating:
            count = self._pieces.count(len(group), self._nothing.device)
            k, z, values = self._pieces.run_to_exit(pool.stage, group.values, self._on, count, None)
            if k == len(self._on):
                z = self._policy.unsure(z, group.state)
            leaves, state = self._decide(k, z, group.state)
        for row, (request, i) in enumerate(group.tickets) if count is not None else ():
            assert count is not None and request.count is not None
            request.count.add(i, count, row)
        for (request, i), logits, leaving in zip(group.tickets, z, leaves, strict=True):
            if leaving:
                request.logits[i], request.exits[i] = logits, k
                request.missing -= 1
        stay = [row for row, leaving in enumerate(leaves) if not leaving]
        if stay:
            left = _Group(values, self._per_sample[k + 1], state, group.tickets)
            self._put(k + 1, left if len(stay) == len(left) else left.select(stay))

    def _decide(self, k: int, z: Tensor, state: State) -> tuple[list[bool], State]:
        if k == len(self._on):
            return [True] * len(z), ()
        leaves, state = self._policy.decide(k, z, state)
        return leaves.tolist(), state

    def _answered(self) -> Iterator[Prediction]:
        """The next batches in input order, as far as they are complete."""
        while self._requests and self._requests[0].missing == 0:
            done = self._requests.popleft()
            logits = torch.stack([row.to(done.logits[0].dtype) for row in done.logits]) if done.exits else self._nothing
            exits = torch.tensor(done.exits, dtype=torch.int64, device=logits.device)
            yield Prediction(logits, exits, self._macs, done.count)


def run_stream(
    pools: Pools, arrivals: Generator[Arrival | None], check: Callable[[Inputs], tuple[list[Any], int]]
) -> Generator[Prediction]:
    """One prediction per batch, in order.

    What is wrong with a batch, or with what makes them, is raised after the answers to the batches before it.

    Args:
        pools: without samples.
        arrivals: batches and their times; None: the time that `pools.wait` gave is over.
        check: the flat inputs of a batch, and how many samples they hold.
    """
    wrong: Exception | None = None
    with closing(arrivals):
        while True:
            try:
                arrival = next(arrivals)
                if arrival is not None:
                    pools.add(*check(arrival[0]), arrival[1])
            except StopIteration:
                break
            except Exception as error:
                wrong = error
                break
            yield from pools.run_ready(more=arrival is not None)
    yield from pools.run_all()
    if wrong is not None:
        raise wrong
