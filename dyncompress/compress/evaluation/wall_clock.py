"""Wall clock: models timed side by side on the same inputs, medians over repeats, any device waited for."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import Subset

from ...runtime.predict.timing import device_of, wait_for
from ..training.batches import LabelledData, call, in_order, size_of


def latency_inputs(
    data: LabelledData, counts: Mapping[int, int], device: torch.device | str = "cpu"
) -> dict[int, list[Any]]:
    """Batches of the first samples: `counts` maps a batch size to how many, e.g. {1: 64, 256: 4}.

    Data too small for that is gone through again.

    Raises:
        RequestError: no data.
    """
    samples = size_of(data, "latency")
    found: dict[int, list[Any]] = {}
    for size, count in counts.items():
        around = Subset(data, [i % samples for i in range(size * count)])
        found[size] = [inputs for inputs, _ in in_order(around, size, torch.device(device))]
    return found


def measure_latency(
    models: Mapping[str, Callable[..., Any]], inputs: Mapping[int, Sequence[Any]], repeats: int = 5
) -> dict[str, dict[int, float]]:
    """Milliseconds per call, by model and batch size, of models measured side by side: A B A B ... on the same inputs.

    Each input's time is the median of `repeats` calls, after one that warms up. At batch 1 the result is the mean over
    the inputs - a dynamic model's time depends on the sample, and the mean is what a stream of them takes - and at
    larger batches the median over the inputs.

    Args:
        models: what to call, e.g. {"static": static, "dynamic": dynamic.predict}; in eval mode, on the inputs' device.
        inputs: batch size -> different batches of real samples (`latency_inputs`).
    """
    result: dict[str, dict[int, float]] = {name: {} for name in models}
    with torch.inference_mode():
        for size, batches in inputs.items():
            medians: dict[str, list[float]] = {name: [] for name in models}
            for batch in batches:
                for name, times in _side_by_side(models, batch, repeats).items():
                    medians[name].append(median(times))
            for name, values in medians.items():
                result[name][size] = fmean(values) if size == 1 else median(values)
    return result


def _side_by_side(models: Mapping[str, Callable[..., Any]], batch: Any, repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in models}
    device = device_of(batch)
    for repeat in range(1 + repeats):
        for name, model in models.items():
            wait_for(device)
            start = perf_counter()
            call(model, batch)
            wait_for(device)
            if repeat:
                times[name].append(1000 * (perf_counter() - start))
    return times
