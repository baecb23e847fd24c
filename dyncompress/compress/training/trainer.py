"""One training loop for every method: accelerate for devices, precision and processes; interrupted runs resume exactly.

The random numbers and the data order of an epoch are functions of (seed, epoch, process) alone. So the state at the end
of an epoch is the weights, the optimiser, the hooks' own state and the epoch's number, and an interrupted run continues
as if nothing had happened. What methods do between steps and epochs, surgery too, are hooks (`hooks.py`).
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32, set_seed
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ...errors import DynCompressError, RequestError
from ..options.choices import OptimizerName
from ..options.steps import completed
from ..options.training_options import Run, Training
from .batches import LabelledData, call, placed, size_of, to_device, unpack
from .hooks import Hook
from .machine import Shell, accelerator_of, own_random_numbers
from .schedule import Shuffled, Timetable, seed_of
from .store import Store
from .surgery import KeepByName, Surgery, carry_over, operate

CHECKPOINT = "training.pt"

_CLIP_NORM = 5.0
_HELD = ("model", "optimizer", "scaler", "surgeries", "hooks", "history")  # by a checkpoint

LossFunction = Callable[[Any, Tensor], Tensor]  # (the model's output, labels (B,)) -> scalar
Optimizer = Callable[..., torch.optim.Optimizer]  # (parameters or groups, lr=...) -> an optimiser

OPTIMIZERS: dict[OptimizerName, Optimizer] = {
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}
FIT = Training(lr=1e-3, batch_size=128, optimizer="adamw")


@dataclass(frozen=True)
class Epoch:
    """What one epoch did: its number from 1, the mean loss over its batches, its last learning rate, wall seconds, and
    the samples of a batch in each process."""

    epoch: int
    loss: float
    lr: float
    seconds: float
    batch_size: int


def fit(
    model: nn.Module,
    loss_fn: LossFunction,
    dataset: LabelledData,
    training: Training,
    run: Run = Run(),
    *,
    parameters: Iterable[Any] | None = None,
    keep_eval: Iterable[nn.Module] = (),
    hooks: Sequence[Hook] = (),
    teacher: nn.Module | None = None,
) -> list[Epoch]:
    """Trains `model` in place, with a linear warm-up over a tenth of the steps and a cosine to zero.

    Gradients are clipped to norm 5. The model returns to the device and the modes it came with. Batches are whole: the
    samples left over differ from epoch to epoch. Under `accelerate launch` every process takes its own batches.

    Args:
        loss_fn: (the model's output, labels (B,) int64) -> scalar; one that is a hook is the last of the hooks.
        dataset: map-style, of (inputs, int label); inputs a tensor, a tuple of arguments or a dict of keywords.
        training: epochs are needed; lr, batch_size and optimizer are by default those of `FIT`.
        parameters: what to train, or optimiser groups with their own "lr"; None = all that require gradients.
        keep_eval: modules that stay in eval mode, such as a frozen trunk with its BatchNorm and dropout.
        hooks: what takes part in the training, in this order at every moment. Where one puts a smaller model in the
            place of `model`, that one is trained from there on, and is the hook's to hand on.
        teacher: in evaluation mode, without gradients; `loss_fn` then gets the pair (the model's output, its output).
        run: the state is saved in `training.pt` in its run_dir.

    Raises:
        RequestError: wrong arguments, no data, a run_dir that holds a run but no `resume`, or another run's.
        DynCompressError: the loss is no longer finite.
        KeyboardInterrupt: interrupted; the message says where the run can be continued from.
    """
    training, optimizer = _checked(training, run)
    accelerator = accelerator_of(training.mixed_precision)
    timetable = _timetable(size_of(dataset, "training"), accelerator.num_processes, training)
    every = [*hooks, loss_fn] if isinstance(loss_fn, Hook) else list(hooks)
    groups = list(parameters) if parameters is not None else [p for p in model.parameters() if p.requires_grad]
    store = Store(run.run_dir, CHECKPOINT, _settings(timetable, run.seed, every), resume=run.resume, holds=_HELD)
    where = torch.device(run.device or accelerator.device)
    work = _Run(model, loss_fn, dataset, timetable, run.seed, accelerator, where, every, teacher)
    still = [*keep_eval, teacher] if teacher is not None else list(keep_eval)
    taught = placed(teacher, where) if teacher is not None else nullcontext()
    with placed(model, where), taught, own_random_numbers(where), work.prepared(groups, optimizer):
        return work.train(store, still, run.shows_progress and accelerator.is_local_main_process)


def _checked(training: Training, run: Run) -> tuple[Training, Optimizer]:
    """With all defaults, and what makes the optimiser. Raises RequestError for what cannot be."""
    training = completed(training, FIT)
    if training.epochs is None:
        raise RequestError("epochs is None: give a positive number")
    if run.seed < 0:
        raise RequestError(f"seed is {run.seed}: give a number that is not negative")
    make = training.optimizer
    if isinstance(make, str) and make not in OPTIMIZERS:
        raise RequestError(f"optimizer={make!r}: use one of {', '.join(OPTIMIZERS)}, or give what makes one")
    return training, OPTIMIZERS[make] if isinstance(make, str) else make


def _timetable(samples: int, processes: int, training: Training) -> Timetable:
    """Of batches of batch_size, or of a process's share of the samples where that is less."""
    batch_size = max(1, min(training.batch_size, samples // processes))
    return Timetable(samples, processes, training.lr, (batch_size,) * training.epochs)


def _settings(timetable: Timetable, seed: int, hooks: Iterable[Hook]) -> dict[str, object]:
    """What must be the same for a run to continue."""
    settings: dict[str, object] = {
        "epochs": len(timetable.batch_sizes), "lr": timetable.lr, "batch_size": timetable.batch_sizes[0], "seed": seed,
        "samples": timetable.samples, "processes": timetable.processes,
    }  # fmt: skip
    for hook in hooks:
        settings |= hook.settings()
    return settings


class _Run:
    """A model, its optimiser and its data, prepared for this process; `TrainingRun` is what hooks see of it."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        dataset: LabelledData,
        timetable: Timetable,
        seed: int,
        accelerator: Accelerator,
        device: torch.device,
        hooks: Sequence[Hook],
        teacher: nn.Module | None,
    ) -> None:
        self.model, self.loss_fn, self.dataset, self.teacher = model, loss_fn, dataset, teacher
        self.timetable, self.seed, self.hooks = timetable, seed, hooks
        self.accelerator, self.device = accelerator, device
        self.batches = Shuffled(timetable, seed, accelerator.process_index)
        self.loader = DataLoader(dataset, batch_sampler=self.batches)
        self.surgeries: list[KeepByName] = []

    @contextmanager
    def prepared(self, groups: list[Any], make: Optimizer) -> Iterator[None]:
        """A fresh optimiser, and the model wrapped for precision and processes until the end."""
        if not groups:
            raise RequestError("there is nothing to train: no parameter requires gradients")
        self.bare_optimizer = make(groups, lr=self.timetable.lr)
        self.peaks = [group["lr"] for group in self.bare_optimizer.param_groups]
        self._wrap()
        try:
            yield
        finally:
            self.accelerator.free_memory()

    def _wrap(self) -> None:
        self.wrapped = self.accelerator.prepare_model(Shell(self.model), device_placement=False)
        self.optimizer = self.accelerator.prepare_optimizer(self.bare_optimizer, device_placement=False)

    def _adopt(self, surgery: Surgery) -> None:
        """Goes on with a smaller model and with what the optimiser knows of it."""
        self.accelerator.free_memory()  # the old model and its wrappers
        carry_over(self.bare_optimizer, self.model, surgery)
        self.model = surgery.model
        self._wrap()
        self.surgeries.append(surgery.keep)
        for hook in self.hooks:
            hook.adopt(surgery)

    def reschedule(self, timetable: Timetable) -> None:
        """Other steps from now on; every hook is told."""
        self.timetable = self.batches.timetable = timetable
        for hook in self.hooks:
            hook.reschedule(timetable)

    def train(self, store: Store, keep_eval: list[nn.Module], progress: bool) -> list[Epoch]:
        """All epochs that are not done yet; the history of all."""
        self.model.train()
        for module in keep_eval:
            module.eval()
        self.reschedule(self.timetable)
        for hook in self.hooks:
            hook.begin(self)
        history = self._restored(store)
        done, epochs = len(history), len(self.timetable.batch_sizes)
        steps = self.timetable.steps_after(done)
        bar = tqdm(total=self.timetable.steps, initial=steps, unit="step", file=sys.stderr, disable=not progress)
        try:
            with bar:
                for epoch in range(done, epochs):
                    bar.set_description(f"epoch {epoch + 1}/{epochs}")
                    history.append(self._epoch(epoch, bar))
                    for hook in self.hooks:
                        surgery = hook.after_epoch(epoch + 1)
                        if surgery is not None:
                            self._adopt(surgery)
                    bar.total = self.timetable.steps
                    store.save(self._state(history))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_interrupted(len(history), epochs, store.folder)) from None
        return history

    def _epoch(self, epoch: int, bar: "tqdm[Any]") -> Epoch:
        began, total = time.perf_counter(), 0.0
        self.batches.epoch = epoch
        set_seed(seed_of(self.seed, epoch, 1 + self.accelerator.process_index))
        for step, batch in enumerate(self.loader, start=self.timetable.steps_after(epoch)):
            loss = self._step(step, batch)
            total += loss
            for hook in self.hooks:
                hook.after_step(step)
            bar.update()
            shown = {name: text for hook in self.hooks for name, text in hook.postfix().items()}
            bar.set_postfix(loss=f"{loss:.4f}", **shown, refresh=False)
        mean = torch.tensor(total / len(self.batches), device=self.accelerator.device)
        mean = self.accelerator.reduce(mean, "mean")
        lr, size = self.optimizer.param_groups[0]["lr"], self.timetable.batch_sizes[epoch]
        return Epoch(epoch + 1, float(mean), lr, time.perf_counter() - began, size)

    def _step(self, step: int, batch: Any) -> float:
        inputs, labels = unpack(batch)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.timetable.rates[step]
        inputs = to_device(inputs, self.device)
        output = call(self.wrapped, inputs)
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                output = output, convert_to_fp32(call(self.teacher, inputs))
        loss = self.loss_fn(output, labels.to(self.device))
        value = loss.item()
        if not math.isfinite(value):
            raise DynCompressError(
                f"the loss became {value} at step {step} of {self.timetable.steps}: try a learning rate below "
                f'{self.timetable.lr:g}, mixed_precision="no", or look for bad values in the data'
            )
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.accelerator.clip_grad_norm_(trained, _CLIP_NORM)
        self.optimizer.step()
        return value

    # --- what a checkpoint holds ------------------------------------------------------------------------------------

    def _state(self, history: list[Epoch]) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "surgeries": self.surgeries,
            "hooks": [(type(hook).__name__, hook.state_dict()) for hook in self._stateful()],
            "history": [asdict(epoch) for epoch in history],
        }

    def _stateful(self) -> list[Hook]:
        return [hook for hook in self.hooks if hook.state_dict()]

    def _restored(self, store: Store) -> list[Epoch]:
        state = store.saved
        if state is None:
            return []
        before, now = [name for name, _ in state["hooks"]], [type(hook).__name__ for hook in self._stateful()]
        if before != now:
            names = [", ".join(hooks) or "no hook" for hooks in (before, now)]
            raise RequestError(f"the run in {store.folder} has {names[0]}, not {names[1]}: use another run_dir")
        for keep in state["surgeries"]:
            assert isinstance(self.model, fx.GraphModule)
            self._adopt(operate(self.model, keep, check=False))
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise RequestError(f"the run in {store.folder} is one of another model: use another run_dir") from error
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for hook, (_, saved) in zip(self._stateful(), state["hooks"], strict=True):
            hook.load_state_dict(saved)
        return [Epoch(**record) for record in state["history"]]


def _interrupted(done: int, epochs: int, folder: Path | None) -> str:
    """What to tell a user who stopped the run."""
    where = f"interrupted after {done} of {epochs} epochs"
    if folder is None:
        return f"{where}; nothing was saved (give a run_dir to be able to resume)"
    return f"{where}; continue with resume and run_dir {folder}"


def in_phases(phases: Sequence[Callable[[Run], list[Epoch]]], run: Run) -> list[Epoch]:
    """Trains in one phase after the other, and numbers the epochs through.

    phases: each trains as its part of the run; several keep their states in folders of their own.
    """
    history: list[Epoch] = []
    for number, train in enumerate(phases, start=1):
        part = run.part(f"phase-{number}") if len(phases) > 1 else run
        history += [replace(epoch, epoch=len(history) + epoch.epoch) for epoch in train(part)]
    return history


@contextmanager
def fixed(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """These parameters do not learn meanwhile."""
    held = list(parameters)
    for parameter in held:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad = True
