"""What the report says of each compared model: accuracy, MACs, size, and wall clock taken side by side."""

from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.data import ConcatDataset

from ...passes.graph.cost import count_bytes, count_macs, count_parameters
from ...runtime.predict.dynamic import DynamicModel
from ..training.batches import LabelledData, placed
from .evaluate import evaluate
from .wall_clock import latency_inputs, measure_latency

LATENCY_BATCHES = {1: 32, 256: 2}  # batch size -> how many different batches
_REPEATS = 3


def measure(
    models: Mapping[str, nn.Module],
    graphs: Mapping[str, fx.GraphModule],
    example_inputs: Any,
    test: LabelledData | None,
    device: torch.device,
    batches: Mapping[int, int] = LATENCY_BATCHES,
    repeats: int = _REPEATS,
) -> dict[str, dict[str, Any]]:
    """One entry of the report per model, all judged on the test data and timed on the same inputs.

    `graphs` are the same models captured, to count MACs on; `batches` are the batch sizes to time, and how many
    batches of each, `repeats` how often each. Without data, accuracy and mean_macs are None and the example inputs are
    timed.
    """
    entries = {name: _entry(model, graphs[name], test, device) for name, model in models.items()}
    for name, by_batch in _latencies(models, example_inputs, test, device, batches, repeats).items():
        entries[name]["latency_ms"] = {str(batch): ms for batch, ms in by_batch.items()}
    return entries


def _entry(model: nn.Module, graph: fx.GraphModule, test: LabelledData | None, device: torch.device) -> dict[str, Any]:
    found = evaluate(model, test, device=device) if test is not None else None
    accuracy = found.accuracy if found is not None else None
    size: dict[str, Any] = {"parameters": count_parameters(model), "bytes": count_bytes(model)}
    if found is not None and found.perplexity is not None:
        size["perplexity"] = found.perplexity
    if not isinstance(model, DynamicModel):
        return {"accuracy": accuracy, "macs": count_macs(graph), **size}
    exits = [asdict(use) for use in found.exits] if found is not None else _unused_exits(model)
    mean_macs = found.mean_macs if found is not None else None
    return {"accuracy": accuracy, "mean_macs": mean_macs, **size, "exits": exits}


def _unused_exits(model: DynamicModel) -> list[dict[str, Any]]:
    places = zip([*model.exits, "output"], model.exit_macs, strict=True)
    return [{"at": at, "macs": macs, "share": None, "accuracy": None} for at, macs in places]


def _latencies(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
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


def _resized(example_inputs: Any, batch: int, device: torch.device) -> Any:
    """The example with its samples repeated to the batch size."""
    tensors = [leaf for leaf in pytree.tree_leaves(example_inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    own = tensors[0].shape[0]
    rows = torch.arange(batch) % own

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return (leaf[rows] if leaf.dim() and leaf.shape[0] == own else leaf).to(device)

    return pytree.tree_map(resize, example_inputs)
