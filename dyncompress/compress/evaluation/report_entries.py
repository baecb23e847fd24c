"""What the report says of each compared model: accuracy, MACs, size, and wall clock taken side by side."""

from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.data import ConcatDataset

from ...passes.graph.cost import count_bytes, count_macs, count_parameters
from ...passes.graph.inputs import Inputs
from ...runtime.predict.dynamic import DynamicModel
from ..training.batches import LabelledData, placed
from .evaluate import Evaluation, ExitUse, evaluate
from .wall_clock import latency_inputs, measure_latency

LATENCY_BATCHES = {1: 32, 256: 2}  # batch size -> how many different batches
_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What every entry tells: accuracy (0..1, None without data), parameters, bytes, the median wall clock of a call by
    batch size, and the perplexity of a model that answers at every position."""

    accuracy: float | None
    parameters: int
    bytes: int
    latency_ms: dict[str, float]
    perplexity: float | None = None


@dataclass(frozen=True, kw_only=True)
class StaticEntry(_Entry):
    """A static model; `macs` of one sample."""

    macs: int

    @property
    def macs_per_sample(self) -> float:
        """Known without data."""
        return self.macs


@dataclass(frozen=True, kw_only=True)
class DynamicEntry(_Entry):
    """A dynamic model; MACs are the mean over the samples of the data, None without."""

    mean_macs: float | None
    exits: tuple[ExitUse, ...]

    @property
    def macs_per_sample(self) -> float | None:
        """The mean over the samples."""
        return self.mean_macs


Entry = StaticEntry | DynamicEntry


def measure(
    models: Mapping[str, nn.Module],
    graphs: Mapping[str, fx.GraphModule],
    example_inputs: Inputs,
    test: LabelledData | None,
    device: torch.device,
    batches: Mapping[int, int] = LATENCY_BATCHES,
    repeats: int = _REPEATS,
) -> dict[str, Entry]:
    """One entry of the report per model, all judged on the test data and timed on the same inputs.

    `graphs` are the same models captured, to count MACs on; `batches` are the batch sizes to time, and how many
    batches of each, `repeats` how often each. Without data, the example inputs are timed.
    """
    found = {name: evaluate(model, test, device=device) if test is not None else None for name, model in models.items()}
    times = _latencies(models, example_inputs, test, device, batches, repeats)
    return {name: _entry(model, graphs[name], found[name], times[name]) for name, model in models.items()}


def _entry(model: nn.Module, graph: fx.GraphModule, found: Evaluation | None, times: Mapping[int, float]) -> Entry:
    common: dict[str, Any] = {
        "accuracy": found.accuracy if found is not None else None,
        "parameters": count_parameters(model),
        "bytes": count_bytes(model),
        "latency_ms": {str(batch): ms for batch, ms in times.items()},
        "perplexity": found.perplexity if found is not None else None,
    }
    if not isinstance(model, DynamicModel):
        return StaticEntry(macs=count_macs(graph), **common)
    if found is not None:
        return DynamicEntry(mean_macs=found.mean_macs, exits=found.exits, **common)
    places = zip([*model.exits, "output"], model.exit_macs, strict=True)
    unused = tuple(ExitUse(at=at, macs=macs, share=None, accuracy=None) for at, macs in places)
    return DynamicEntry(mean_macs=None, exits=unused, **common)


def _latencies(
    models: Mapping[str, nn.Module],
    example_inputs: Inputs,
    test: LabelledData | None,
    device: torch.device,
    batches: Mapping[int, int],
    repeats: int,
) -> dict[str, dict[int, float]]:
    if test is not None:
        inputs = latency_inputs(_at_least(test, max(batches)), batches, device)
    else:
        inputs = {size: [_resized(example_inputs, size, device)] for size in batches}
    with _running(models, device) as calls:
        return measure_latency(calls, inputs, repeats)


@contextmanager
def _running(models: Mapping[str, nn.Module], device: torch.device) -> Iterator[dict[str, Callable[..., Any]]]:
    """What to call for each model, all of them in eval mode on the device meanwhile."""
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(placed(model, device))
            model.eval()
        yield {name: m.predict if isinstance(m, DynamicModel) else m for name, m in models.items()}


def _at_least(data: LabelledData, count: int) -> LabelledData:
    """The data, repeated until it fills one batch of `count`."""
    assert isinstance(data, Sized)
    return data if len(data) >= count else ConcatDataset([data] * -(-count // len(data)))


def _resized(example_inputs: Inputs, batch: int, device: torch.device) -> Any:
    """The example with its samples repeated to the batch size."""
    tensors = [leaf for leaf in pytree.tree_leaves(example_inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    own = tensors[0].shape[0]
    rows = torch.arange(batch) % own

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return (leaf[rows] if leaf.dim() and leaf.shape[0] == own else leaf).to(device)

    return pytree.tree_map(resize, example_inputs)
