"""One training loop for every method: accelerate for devices, precision and processes; interrupted runs resume exactly.

The random numbers and the data order of an epoch are functions of (seed, epoch, process) alone. So the state at the end
of an epoch is the weights, the optimiser, the loss's own state and the epoch's number, and an interrupted run continues
as if nothing had happened. A surgeon may change the model's shape between epochs, and the batch with it.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import convert_to_fp32, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ...errors import DynCompressError, RequestError
from .batch_growth import bytes_per_sample, largest_batch
from .batches import LabelledData, call, placed, size_of, to_device, unpack
from .machine import Shell, accelerator_of, own_random_numbers
from .run_store import RunStore, Settings
from .schedule import Shuffled, Timetable, seed_of
from .surgery import Surgeon, Surgery, carry_over

_CLIP_NORM = 5.0

LossFunction = Callable[[Any, Tensor], Tensor]  # (the model's output, labels (B,)) -> scalar
Optimizer = Callable[..., torch.optim.Optimizer]  # (parameters or groups, lr=...) -> an optimiser


@runtime_checkable
class Stateful(Protocol):
    """A loss function with a schedule of its own, saved and resumed with the run."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


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
    *,
    epochs: int,
    lr: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
    parameters: Iterable[Any] | None = None,
    keep_eval: Iterable[nn.Module] = (),
    after_step: Callable[[int], None] | None = None,
    optimizer: Optimizer = torch.optim.AdamW,
    surgeon: Surgeon | None = None,
    teacher: nn.Module | None = None,
    mixed_precision: str | None = None,
    device: torch.device | str | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[Epoch]:
    """Trains `model` in place, with a linear warm-up over a tenth of the steps and a cosine to zero.

    Gradients are clipped to norm 5. The model returns to the device and the modes it came with. Batches are whole: the
    samples left over differ from epoch to epoch. Under `accelerate launch` every process takes its own batches.

    Args:
        loss_fn: (the model's output, labels (B,) int64) -> scalar; a `Stateful` one is saved with the run.
        dataset: map-style, of (inputs, int label); inputs a tensor, a tuple of arguments or a dict of keywords.
        lr: the peak learning rate. batch_size: per process.
        parameters: what to train: parameters or optimiser groups, which may set their own "lr"; None = all that
            require gradients.
        keep_eval: modules that stay in eval mode, such as a frozen trunk with its BatchNorm and dropout.
        after_step: called after every optimiser step with its number from 0.
        optimizer: makes one of parameters and lr, such as `partial(torch.optim.SGD, momentum=0.9)`.
        surgeon: acts after every step; the model that it puts in place of `model` is its own to hand on. Where it asks
            for it, batches and learning rates grow as that model needs less memory.
        teacher: answers the same inputs, in evaluation mode and without gradients; `loss_fn` then gets the pair (the
            model's output, the teacher's).
        mixed_precision: "no", "fp16" or "bf16"; None = what accelerate is configured to.
        device: None = what accelerate chooses.
        run_dir: where the state is saved after every epoch, in `training.pt`.
        resume: continue the run in run_dir, if there is one; the weights come out exactly as if never interrupted.
        progress: a progress bar on standard error.

    Raises:
        RequestError: wrong arguments, no data, a run_dir that holds a run but no `resume`, or another run's.
        DynCompressError: the loss is no longer finite.
        KeyboardInterrupt: interrupted; the message says where the run can be continued from.
    """
    for name, value in {"epochs": epochs, "batch_size": batch_size, "lr": lr}.items():
        if not value > 0:
            raise RequestError(f"{name} is {value}: give a positive number")
    if seed < 0:
        raise RequestError(f"seed is {seed}: give a number that is not negative")
    accelerator = accelerator_of(mixed_precision)
    samples = size_of(dataset, "training")
    batch_size = max(1, min(batch_size, samples // accelerator.num_processes))
    request = dict(surgeon.request) if surgeon is not None else {}
    settings = Settings(epochs, lr, batch_size, seed, samples, accelerator.num_processes, request)
    groups = list(parameters) if parameters is not None else [p for p in model.parameters() if p.requires_grad]
    store = RunStore(Path(run_dir) if run_dir is not None else None, settings, resume)
    where = torch.device(device or accelerator.device)
    run = _Run(model, loss_fn, dataset, settings, accelerator, where, surgeon, teacher)
    still = [*keep_eval, teacher] if teacher is not None else list(keep_eval)
    taught = placed(teacher, where) if teacher is not None else nullcontext()
    with placed(model, where), taught, own_random_numbers(where), run.prepared(groups, optimizer):
        return run.train(store, still, after_step, progress and accelerator.is_local_main_process)


class _Run:
    """A model, its optimiser and its data, prepared for this process."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        dataset: LabelledData,
        settings: Settings,
        accelerator: Accelerator,
        device: torch.device,
        surgeon: Surgeon | None,
        teacher: nn.Module | None,
    ) -> None:
        self.surgeon, self.teacher = surgeon, teacher
        self.model, self.loss_fn, self.dataset, self.settings = model, loss_fn, dataset, settings
        self.accelerator, self.device = accelerator, device
        sizes = (settings.batch_size,) * settings.epochs
        self.timetable = Timetable(settings.samples, settings.processes, settings.lr, sizes)
        self.batches = Shuffled(self.timetable, settings.seed, accelerator.process_index)
        self.loader = DataLoader(dataset, batch_sampler=self.batches)

    @contextmanager
    def prepared(self, groups: list[Any], make: Optimizer) -> Iterator[None]:
        """A fresh optimiser, and the model wrapped for precision and processes until the end."""
        if not groups:
            raise RequestError("there is nothing to train: no parameter requires gradients")
        self.bare_optimizer = make(groups, lr=self.settings.lr)
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

    def _reschedule(self, timetable: Timetable) -> None:
        self.timetable = self.batches.timetable = timetable
        if self.surgeon is not None:
            self.surgeon.reschedule(timetable)

    def _memory(self) -> int:
        """Bytes that a step keeps for one sample, or 0 where nobody asks; the same in every process."""
        if self.surgeon is None or not self.surgeon.grow_batch:
            return 0
        own = bytes_per_sample(self.model, self.dataset, self.accelerator.autocast())
        return int(self.accelerator.reduce(torch.tensor(own, device=self.accelerator.device), "sum"))

    def _grow(self, epoch: int, whole: int) -> None:
        """From an epoch on, the largest batch that keeps no more than the first one did; `whole`: `_memory` then."""
        most = self.settings.samples // self.settings.processes
        size = largest_batch(self.settings.batch_size, whole, self._memory(), most)
        self._reschedule(self.timetable.with_batches(epoch, size))

    def train(
        self,
        store: RunStore,
        keep_eval: list[nn.Module],
        after_step: Callable[[int], None] | None,
        progress: bool,
    ) -> list[Epoch]:
        """All epochs that are not done yet; the history of all."""
        self.model.train()
        for module in keep_eval:
            module.eval()
        self._reschedule(self.timetable)
        whole = self._memory()
        if self.surgeon is not None:
            self.surgeon.begin()
        history = self._restored(store)
        done = len(history)
        steps = self.timetable.steps_after(done)
        bar = tqdm(total=self.timetable.steps, initial=steps, unit="step", file=sys.stderr, disable=not progress)
        try:
            with bar:
                for epoch in range(done, self.settings.epochs):
                    bar.set_description(f"epoch {epoch + 1}/{self.settings.epochs}")
                    history.append(self._epoch(epoch, after_step, bar))
                    surgery = self.surgeon.operate(epoch + 1) if self.surgeon is not None else None
                    if surgery is not None:
                        self._adopt(surgery)
                        if whole:
                            self._grow(epoch + 1, whole)
                            bar.total = self.timetable.steps
                    self.accelerator.wait_for_everyone()
                    if self.accelerator.is_main_process:
                        store.save(self._state(history))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(store.interrupted(len(history))) from None
        return history

    def _epoch(self, epoch: int, after_step: Callable[[int], None] | None, bar: "tqdm[Any]") -> Epoch:
        began, total = time.perf_counter(), 0.0
        self.batches.epoch = epoch
        set_seed(seed_of(self.settings.seed, epoch, 1 + self.accelerator.process_index))
        for step, batch in enumerate(self.loader, start=self.timetable.steps_after(epoch)):
            loss = self._step(step, batch)
            total += loss
            if self.surgeon is not None:
                self.surgeon.after_step(step)
            bar.update()
            shown = self.surgeon.progress if self.surgeon is not None else {}
            bar.set_postfix(loss=f"{loss:.4f}", **shown, refresh=False)
            if after_step is not None:
                after_step(step)
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
                f'{self.settings.lr:g}, mixed_precision="no", or look for bad values in the data'
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
            "loss": self.loss_fn.state_dict() if isinstance(self.loss_fn, Stateful) else {},
            "surgeon": self.surgeon.state_dict() if self.surgeon is not None else {},
            "batch_sizes": list(self.timetable.batch_sizes),
            "history": [asdict(epoch) for epoch in history],
        }

    def _restored(self, store: RunStore) -> list[Epoch]:
        state = store.saved
        if state is None:
            return []
        for surgery in self.surgeon.load_state_dict(state["surgeon"]) if self.surgeon is not None else ():
            self._adopt(surgery)
        self._reschedule(replace(self.timetable, batch_sizes=tuple(state["batch_sizes"])))
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise RequestError(f"the run in {store.folder} is one of another model: use another run_dir") from error
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if isinstance(self.loss_fn, Stateful):
            self.loss_fn.load_state_dict(state["loss"])
        return [Epoch(**record) for record in state["history"]]


def count_steps(dataset: LabelledData, epochs: int, batch_size: int) -> int:
    """How many steps `fit` takes."""
    processes, size = PartialState().num_processes, size_of(dataset, "training")
    return epochs * (size // (processes * max(1, min(batch_size, size // processes))))


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
