"""How a training is laid out: the batches of every epoch, the steps that this makes, and their learning rates.

The learning rate follows the share of the epochs that is done: a linear warm-up, then half a cosine. An epoch whose
batch is k times the first has fewer steps, k times as large (linear scaling rule: Goyal et al. 2017, section 2.1).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Sampler

_WARM_UP = 0.1  # of all steps


@dataclass(frozen=True)
class Timetable:
    """`batch_sizes` are those of every epoch, in samples per process; `lr` is the peak learning rate of the first."""

    samples: int
    processes: int
    lr: float
    batch_sizes: tuple[int, ...]

    @property
    def growth(self) -> float:
        """How many times the first batch the last one is."""
        return self.batch_sizes[-1] / self.batch_sizes[0]

    def steps_in(self, epoch: int) -> int:
        """The number of whole batches of an epoch, from 0, in each process."""
        return self.samples // (self.batch_sizes[epoch] * self.processes)

    def steps_after(self, epochs: float) -> int:
        """The number of steps in the first so many epochs; a part of one is rounded to whole steps."""
        whole = int(epochs)
        part = round((epochs - whole) * self.steps_in(whole)) if epochs > whole else 0
        return sum(map(self.steps_in, range(whole))) + part

    @cached_property
    def steps(self) -> int:
        """All of them."""
        return self.steps_after(len(self.batch_sizes))

    @cached_property
    def rates(self) -> list[float]:
        """The learning rate of every step, as a multiple of the first batch's peak."""
        first, rates = self.steps_in(0), list[float]()
        for epoch, size in enumerate(self.batch_sizes):
            steps, growth = self.steps_in(epoch), size / self.batch_sizes[0]
            places = (epoch * first + step * first / steps for step in range(steps))  # in steps of the first batch
            rates += [growth * _curve(place, len(self.batch_sizes) * first) for place in places]
        return rates

    @cached_property
    def lrs(self) -> list[float]:
        """The learning rate of every step."""
        return [self.lr * rate for rate in self.rates]

    def with_batches(self, epoch: int, batch_size: int) -> "Timetable":
        """From an epoch on, numbered from 0, batches of another size."""
        rest = (batch_size,) * (len(self.batch_sizes) - epoch)
        return replace(self, batch_sizes=self.batch_sizes[:epoch] + rest)


class Shuffled(Sampler[list[int]]):
    """Batches of indices in an order that depends on seed and epoch alone; every process takes its own."""

    def __init__(self, timetable: Timetable, seed: int, process: int) -> None:
        self.timetable, self.seed, self.process, self.epoch = timetable, seed, process, 0

    def __len__(self) -> int:
        return self.timetable.steps_in(self.epoch)

    def __iter__(self) -> Iterator[list[int]]:
        table = self.timetable
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch, 0))
        order = torch.randperm(table.samples, generator=generator)
        shape = (len(self), table.processes, table.batch_sizes[self.epoch])
        yield from order[: math.prod(shape)].view(shape)[:, self.process].tolist()


def seed_of(*parts: int) -> int:
    """One 32-bit seed out of several numbers; different numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _curve(step: float, steps: int) -> float:
    """The share of the peak learning rate: a linear warm-up, then half a cosine."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return min(1.0, (step + 1) / warm)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
