"""How a method takes part in the training loop: a hook is told of the moments below, and is saved and resumed with it.

    reschedule     what the steps are: before anything else, and again whenever those to come have changed
    begin          before the first step, or before a saved run is taken up
    after_step     the optimiser has moved the weights
    after_epoch    the model may be replaced by a smaller one
    adopt          it was

A further moment is one more method here, which does nothing, and the line in `trainer.py` that calls it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from .batches import LabelledData
from .schedule import Timetable
from .surgery import Surgery

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainingRun(Protocol):
    """What a hook sees of the training that it takes part in; `model` is the model as it is now."""

    model: nn.Module
    dataset: LabelledData
    accelerator: "Accelerator"
    timetable: Timetable

    def reschedule(self, timetable: Timetable) -> None:
        """Other steps from now on; every hook is told."""


class Hook:
    """Takes part in a training; every moment is nothing but for what a subclass makes of it."""

    def settings(self) -> Mapping[str, object]:
        """What must be the same for a run to continue, by name."""
        return {}

    def postfix(self) -> Mapping[str, str]:
        """What the progress bar shows beside the loss."""
        return {}

    def reschedule(self, timetable: Timetable) -> None:
        """What the steps are."""

    def begin(self, run: TrainingRun) -> None:
        """Nothing is trained or taken up yet; the model is on its device."""

    def after_step(self, step: int) -> None:
        """The optimiser's step of this number, from 0, is done."""

    def after_epoch(self, epoch: int) -> Surgery | None:
        """The epoch of this number, from 1, is done; returns the smaller model to go on with, if the model changes."""
        return None

    def adopt(self, surgery: Surgery) -> None:
        """The training goes on with a smaller model. The surgeries of a saved run are made again before its state is
        taken up."""

    def state_dict(self) -> dict[str, Any]:
        """What is saved with the run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""


class Progress(Hook):
    """How far a training is, for all that changes on the way: `done` of `steps`."""

    steps: int = 1
    done: int = 0

    @property
    def fraction(self) -> float:
        """0 at the first step, 1 after the last."""
        return min(1.0, self.done / self.steps)

    def reschedule(self, timetable: Timetable) -> None:
        self.steps = timetable.steps

    def after_step(self, step: int) -> None:
        self.done = step + 1

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = int(state["done"])


class ScheduledLoss(Progress):
    """A loss that is told how far the training is. `name` says which it is: a run goes on with the same one only."""

    name: str

    def settings(self) -> Mapping[str, object]:
        return {"loss": self.name}
