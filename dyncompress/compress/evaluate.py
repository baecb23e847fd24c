"""What a model does on data: accuracy, MACs, who answered, and wall-clock time, for static and dynamic models alike."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Subset

from ..errors import RequestError
from ..passes.cost import count_macs
from ..runtime.dynamic import DynamicModel
from .batches import LabelledData, call, device_of_model, in_order, placed, size_of


@dataclass(frozen=True)
class ExitUse:
    """One exit on a data set.

    at: the graph node it follows; "output" for the final one. macs: of a sample that leaves there.
    share: of the samples that it answered, 0..1. accuracy: on those, 0..1; None where there are none.
    """

    at: str
    macs: int
    share: float
    accuracy: float | None


@dataclass(frozen=True)
class Evaluation:
    """accuracy: 0..1. mean_macs: per sample, None for a module that was not captured. exits: none in a static model."""

    samples: int
    accuracy: float
    mean_macs: float | None
    exits: tuple[ExitUse, ...] = ()


def evaluate(
    model: nn.Module, data: LabelledData, batch_size: int = 256, device: torch.device | str | None = None
) -> Evaluation:
    """Runs the whole data set through a dynamic model's `predict`, or through a static model's forward.

    Args:
        data: map-style, of (inputs, int label).
        device: None = where the model is; it returns there.

    Raises:
        RequestError: no data, or an output without (B, classes) logits.
    """
    if isinstance(model, DynamicModel):
        return _evaluate_dynamic(model, data, batch_size, device)
    (logits,), labels = collect_logits(model, data, batch_size, device)
    accuracy = float((logits.argmax(-1) == labels).double().mean())
    macs = float(count_macs(model)) if isinstance(model, fx.GraphModule) and "inputs" in model.meta else None
    return Evaluation(len(labels), accuracy, macs)


def _evaluate_dynamic(
    model: DynamicModel, data: LabelledData, batch_size: int, device: torch.device | str | None
) -> Evaluation:
    size_of(data, "evaluation")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with _ready(model, device) as where:
        for inputs, labels in in_order(data, batch_size, where):
            out = call(model.predict, inputs)
            parts.append(((out.logits.argmax(-1) == labels).cpu(), out.exit_index.cpu(), out.macs.cpu()))
    right, index, macs = (torch.cat(column).double() for column in zip(*parts, strict=True))
    uses = []
    for k, (at, cost) in enumerate(zip([*model.exits, "output"], model.exit_macs, strict=True)):
        here = index == k
        used = bool(here.any())
        uses.append(
            ExitUse(
                at=at,
                macs=int(macs[here][0]) if used else cost,  # heads that are off cost nothing
                share=float(here.double().mean()),
                accuracy=float(right[here].mean()) if used else None,
            )
        )
    return Evaluation(len(right), float(right.mean()), float(macs.mean()), tuple(uses))


def collect_logits(
    model: nn.Module, data: LabelledData, batch_size: int = 256, device: torch.device | str | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Every exit's logits (N, classes) over the whole data set - one only for a static model - and the labels (N,).

    They lie on the CPU. See `evaluate` for arguments and errors.
    """
    size_of(data, "evaluation")
    parts: list[tuple[Tensor, ...]] = []
    all_labels: list[Tensor] = []
    with _ready(model, device) as where:
        for inputs, labels in in_order(data, batch_size, where):
            if isinstance(model, DynamicModel):
                logits = call(model.all_logits, inputs)
            else:
                logits = (logits_of(call(model, inputs)),)
            parts.append(tuple(z.float().cpu() for z in logits))
            all_labels.append(labels.cpu())
    return tuple(torch.cat(column) for column in zip(*parts, strict=True)), torch.cat(all_labels)


@contextmanager
def _ready(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """The model in eval mode on the device, no gradients taken; everything as it was afterwards."""
    where = torch.device(device) if device is not None else device_of_model(model)
    with placed(model, where), torch.no_grad():
        model.eval()
        yield where


def logits_of(output: Any) -> Tensor:
    """The (B, classes) logits in a model's output: it itself, what it calls `logits`, or its only such tensor.

    Raises:
        RequestError: there is none, or not just one.
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    found = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.dim() == 2 and t.is_floating_point()]
    if len(found) != 1:
        raise RequestError(
            f"the model's output holds {len(found)} tensors of shape (batch, classes), one is needed: "
            "return the logits alone or under the name `logits`"
        )
    return found[0]


# --- wall clock ------------------------------------------------------------------------------------------------------


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
    for repeat in range(1 + repeats):
        for name, model in models.items():
            _wait(batch)
            start = perf_counter()
            call(model, batch)
            _wait(batch)
            if repeat:
                times[name].append(1000 * (perf_counter() - start))
    return times


def _wait(batch: Any) -> None:
    """Lets the device finish what it was given."""
    if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in pytree.tree_leaves(batch)):
        torch.cuda.synchronize()
