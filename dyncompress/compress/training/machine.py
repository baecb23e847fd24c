"""What a training has of its machine: accelerate's device, precision and processes, and random numbers of its own."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import nn

from ...errors import RequestError


class Shell(nn.Module):
    """Takes the patches that accelerate makes to a module's forward, so that the user's model stays as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def training_device(asked: torch.device | str | None = None) -> torch.device:
    """The device that is asked for, or the one that accelerate chooses on this machine, or for this process."""
    return PartialState().device if asked is None else torch.device(asked)


def accelerator_of(mixed_precision: str | None) -> Accelerator:
    """Raises RequestError for a precision that cannot be had here, or beside what is in use already."""
    try:
        return Accelerator(mixed_precision=mixed_precision)
    except ValueError as error:
        raise RequestError(f"mixed_precision={mixed_precision!r} cannot be used here: {error}") from error


@contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Leaves the global random number generators as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
