"""Batches of labelled data, and calls with their inputs: a tensor, a tuple of arguments or a dict of keywords."""

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Protocol, overload, runtime_checkable

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from ...errors import RequestError
from ...passes.capture.capture import capture
from ...passes.graph.inputs import Inputs, split_inputs
from ...passes.graph.meta import is_captured
from ...runtime.predict.dynamic import DynamicModel

LabelledData = Dataset[Any]  # map-style; item i is (inputs, int label)

_CALIBRATION_SHARE = 0.15  # of a data set that comes without splits


@runtime_checkable
class HasSplits(Protocol):
    """Data that comes divided: `train` fits the weights, `calibration` the temperatures and thresholds."""

    @property
    def train(self) -> LabelledData: ...

    @property
    def calibration(self) -> LabelledData: ...


@overload
def training_part(data: HasSplits | LabelledData) -> LabelledData: ...


@overload
def training_part(data: None) -> None: ...


def training_part(data: HasSplits | LabelledData | None) -> LabelledData | None:
    """What weights are trained on: all of a plain data set."""
    return data.train if isinstance(data, HasSplits) else data


def captured(model: nn.Module, example_inputs: Inputs | None, data: HasSplits | LabelledData | None) -> fx.GraphModule:
    """A captured model as it is; another one captured with one call's inputs, which None takes from the data.

    Raises:
        RequestError: there are neither, the model is dynamic already, or as `capture`.
    """
    if isinstance(model, DynamicModel):
        raise RequestError("this takes a static model, but gets one that is dynamic already: exits and gates come last")
    if is_captured(model):
        return model
    if example_inputs is None:
        example_inputs = examples_for(model, data)
    return capture(model, example_inputs)


def examples_for(model: nn.Module, data: HasSplits | LabelledData | None) -> Inputs:
    """The inputs of the first samples, where the model is. Raises RequestError where there is no data."""
    if data is None:
        raise RequestError("give example_inputs, or data to take them from")
    return to_device(examples_of(training_part(data)), device_of_model(model))


def size_of(data: LabelledData, what: str) -> int:
    """The number of samples.

    Raises:
        RequestError: none, or the dataset cannot tell.
    """
    if not isinstance(data, Sized):
        raise RequestError(f"the {what} data has no length: give a map-style torch Dataset of (input, label)")
    if len(data) == 0:
        raise RequestError(f"the {what} data is empty: give at least one (input, label)")
    return len(data)


def unpack(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and labels of one collated batch.

    Raises:
        RequestError: the dataset does not yield (input, label) pairs.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise RequestError("the dataset must yield pairs (input, int label)")
    return batch[0], batch[1]


def examples_of(data: LabelledData, count: int = 2) -> Any:
    """The inputs of the first samples (again from the start where they are too few) as one batch; `capture` needs two.

    Raises:
        RequestError: no data, or it does not yield (input, label) pairs.
    """
    size = size_of(data, "training")
    return unpack(default_collate([data[index % size] for index in range(count)]))[0]


def in_order(data: LabelledData, batch_size: int, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    """All samples once, in their order, as batches on `device`."""
    for batch in DataLoader(data, batch_size=batch_size):
        inputs, labels = unpack(batch)
        yield to_device(inputs, device), labels.to(device)


def to_device(tree: Any, device: torch.device) -> Any:
    """The same structure with every tensor on `device`."""
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


def call(function: Callable[..., Any], inputs: Inputs) -> Any:
    """Calls with a tensor, a tuple of positional inputs or a dict of keywords."""
    args, kwargs = split_inputs(inputs)
    return function(*args, **kwargs)


def device_of_model(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on `device`; afterwards it is back where it was, every module in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    home = device_of_model(model)
    try:
        model.to(device)
        yield
    finally:
        model.to(home)
        for module, training in modes:
            module.training = training


def split_off(data: LabelledData, share: float, seed: int) -> tuple[LabelledData, LabelledData]:
    """Divides the data at random, the same way for the same seed: what is left, and `share` of it (0..1).

    Raises:
        RequestError: too few samples for two parts.
    """
    count = size_of(data, "training")
    taken = round(share * count)
    if not 0 < taken < count:
        raise RequestError(f"{count} samples are too few to set {share:.0%} aside: give more, or give both parts")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(data, order[taken:]), Subset(data, order[:taken])


def divided(data: HasSplits | LabelledData, seed: int) -> tuple[LabelledData, LabelledData]:
    """The training and the calibration set: the data's own, or 15 % set aside at random.

    Raises:
        RequestError: one of them would be empty.
    """
    if isinstance(data, HasSplits):
        size_of(data.calibration, "calibration")
        return data.train, data.calibration
    return split_off(data, _CALIBRATION_SHARE, seed)
