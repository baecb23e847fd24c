"""What a sample costs in milliseconds on this device, stage by stage and exit by exit.

Thresholds weigh what leaving early saves against what asking costs. In multiply-adds a head is next to nothing; in time
it is the calls of a few small layers, the decision and, on a GPU, a synchronisation. Milliseconds are per sample at one
batch size, on real samples that all stay, the static model's taken in the same breath: medians of several runs. A
larger batch shrinks as samples leave, and its small rest takes longer per sample than is said here.
"""

from dataclasses import dataclass
from statistics import fmean, median
from time import perf_counter

import torch
from torch import Tensor

from ...passes.edit.sample_rows import take_rows
from ...passes.graph.inputs import Inputs, split_inputs
from ...runtime.predict.dynamic import DynamicModel
from ...runtime.predict.pieces import Pieces
from ...runtime.predict.policy import ExitPolicy
from ...runtime.predict.timing import wait_for
from ..evaluation.evaluate import ready
from ..evaluation.wall_clock import latency_inputs
from ..training.batches import LabelledData

_SAMPLES, _LEAST, _REPEATS = 32, 3, 5  # samples to be timed, in so many batches or more, each so often


@dataclass(frozen=True)
class CallTimes:
    """Milliseconds of one sample: stages (K + 1,) without heads, heads (K,) and deciding, the static model."""

    stages: tuple[float, ...]
    heads: tuple[float, ...]
    static: float


def time_costs(
    dynamic: DynamicModel,
    data: LabelledData,
    policy: ExitPolicy,
    *,
    batch: int = 1,
    device: torch.device | str | None = None,
) -> CallTimes:
    """Measured on the first samples of a data set; `policy` decides, whatever its thresholds.

    Raises:
        RequestError: no data.
    """
    pieces = dynamic._pieces()  # compiled, if the model is
    rows: list[list[float]] = []
    with ready(dynamic, device) as where:
        for inputs in latency_inputs(data, {batch: max(_LEAST, _SAMPLES // batch)}, where)[batch]:
            taken = [_walk(pieces, inputs, policy, where) for _ in range(1 + _REPEATS)][1:]
            rows.append([median(column) for column in zip(*taken, strict=True)])
    static, *parts = (fmean(column) for column in zip(*rows, strict=True))
    return CallTimes(tuple(parts[::2]), tuple(parts[1::2]), static)


def _walk(pieces: Pieces, inputs: Inputs, policy: ExitPolicy, device: torch.device) -> list[float]:
    """Milliseconds per sample: static model, first stage, first head, second stage, ..., last stage."""
    args, kwargs = split_inputs(inputs)
    values, n = pieces.calls.read(args, kwargs)
    part = pieces.blocks(0, n, (True,) * (len(pieces.stages) - 1), device)[0]
    values = [x[part] if own else x for x, own in zip(values, pieces.per_sample, strict=True)]
    clock = _Clock(device)
    pieces.static(*args, **kwargs)
    found = [clock.lap() / n]
    state: tuple[Tensor, ...] = ()
    everybody = torch.arange(part.stop, device=device)
    for k, stage in enumerate(pieces.stages):
        if k and part.stop > 1:  # those who stay are gathered
            owned = pieces.stages[k - 1].per_sample
            values = [take_rows(x, everybody) if own else x for x, own in zip(values, owned, strict=True)]
        values = stage.body(*values)[: len(stage.outputs)]
        found.append(clock.lap() / part.stop)
        if stage.head is not None:
            leaves, state = policy.decide(k, stage.head(values[stage.outputs.index(stage.at)]), state)
            _ = leaves.item() if part.stop == 1 else len(torch.nonzero(~leaves).flatten())
            found.append(clock.lap() / part.stop)
    return found


class _Clock:
    """Milliseconds between laps, of all that the device was given to do."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = self._now()

    def _now(self) -> float:
        wait_for(self._device)
        return perf_counter()

    def lap(self) -> float:
        """Since the lap before."""
        begin, self._begin = self._begin, self._now()
        return 1000 * (self._begin - begin)
