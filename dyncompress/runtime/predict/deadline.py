"""A deadline inside one call: whether the next piece of work is still worth beginning."""

from time import perf_counter

import torch

from ...errors import RequestError
from .timing import wait_for


class Deadline:
    """Counts from its creation.

    The time that the work of this very call took so far, per MAC, tells what the next piece will take, so that a slower
    machine, a larger batch or a neighbour's load need no tables.

    Raises:
        RequestError: `ms` is not positive.
    """

    def __init__(self, ms: float, device: torch.device) -> None:
        if not ms > 0:
            raise RequestError(f"deadline_ms is {ms}: give a positive number of milliseconds")
        self._start = perf_counter()
        self._end = self._start + ms / 1000
        self._device = device

    def allows(self, done_macs: float, next_macs: float) -> bool:
        """Whether work of `next_macs` fits, when `done_macs` were done since the start."""
        wait_for(self._device)  # what was started there has not run yet
        now = perf_counter()
        expected = (now - self._start) * next_macs / done_macs if done_macs else 0.0
        return now < self._end and now + expected <= self._end
