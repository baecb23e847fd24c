"""How a verb trains, and how it is run: the two groups of options that all verbs share."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import RequestError
from .choices import OptimizerName, Precision

if TYPE_CHECKING:
    import torch

_OF_THE_VERB: Any = None  # until a verb puts its default in the place


@dataclass(frozen=True, kw_only=True)
class Training:
    """How weights are trained; what is not given is the verb's own default.

    Raises:
        RequestError: epochs, a batch size or a learning rate that is not positive.
    """

    epochs: int = _OF_THE_VERB
    """Passes over the training data."""
    lr: float = _OF_THE_VERB
    """Peak learning rate; of what is new, where exits or gates are added."""
    trunk_lr: float = _OF_THE_VERB
    """Peak learning rate of the layers that the model came with, as a share of lr."""
    batch_size: int = _OF_THE_VERB
    """Samples per training step, in each process."""
    optimizer: OptimizerName | Callable[..., "torch.optim.Optimizer"] = _OF_THE_VERB
    """AdamW, or SGD with momentum 0.9."""
    mixed_precision: Precision | None = None
    """Precision of training; by default what accelerate is configured to."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RequestError(f"{name} is {value}: give a positive number")


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a verb is run."""

    seed: int = 0
    """Seed of every random number."""
    device: "torch.device | str | None" = None
    """Such as "cpu" or "cuda:1"; None: what accelerate chooses."""
    run_dir: str | os.PathLike[str] | None = None
    """Where the state of a training is saved after every epoch; None: nowhere."""
    resume: bool = False
    """Go on with the run in run_dir, if there is one; the weights come out exactly as if never interrupted."""
    progress: bool | None = None
    """Progress bars on standard error; None: where that is a terminal."""

    @property
    def shows_progress(self) -> bool:
        """Whether there are progress bars."""
        return sys.stderr.isatty() if self.progress is None else self.progress

    @property
    def folder(self) -> Path | None:
        """`run_dir` as a path."""
        return None if self.run_dir is None else Path(self.run_dir)

    def part(self, name: str) -> "Run":
        """One of several trainings, in a folder of its own."""
        return self if self.folder is None else replace(self, run_dir=self.folder / name)
