"""The training loop: against a plain PyTorch loop, exact resumption, and what goes wrong."""

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flat_options import flat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import dyncompress as dc
from dyncompress.compress.training.hooks import Hook, Progress, TrainingRun
from dyncompress.compress.training.schedule import Timetable
from dyncompress.compress.training.trainer import Epoch, fit, in_phases
from dyncompress.errors import DynCompressError, RequestError

QUIET = {"device": "cpu", "progress": False}


class Pairs(Dataset):
    """Samples with random augmentation from all three generators, and the inputs in the shape asked for."""

    def __init__(self, samples: int = 37, shape: Callable[[Tensor], Any] = lambda x: x) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(samples, 6, generator=generator)
        self.y = (self.x.sum(1) > 0).long()
        self.shape = shape

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        noise = 0.1 * (torch.randn(6) + float(np.random.rand()) + random.random())
        return self.shape(self.x[index] + noise), int(self.y[index])


class Schedule(Hook):
    """Cross-entropy with a state that changes at every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(z, y) * (1 + self.calls / 10)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def same(a: nn.Module, b: nn.Module) -> bool:
    states = a.state_dict(), b.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Stop(Exception):
    pass


class StopAt(Hook):
    """Raises after a step."""

    def __init__(self, step: int, error: type[BaseException] = Stop) -> None:
        self.step, self.error = step, error

    def after_step(self, step: int) -> None:
        if step == self.step:
            raise self.error


def test_equals_a_plain_loop() -> None:
    data, lr, batch, epochs = Pairs(), 0.01, 8, 3
    plain = TensorDataset(data.x, data.y)
    seen: list[int] = []

    class Recorded(Dataset):  # the order of the samples is read from what fit asks for
        def __len__(self) -> int:
            return len(plain)

        def __getitem__(self, index: int) -> Any:
            seen.append(index)
            return plain[index][0], int(plain[index][1])

    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    reference = copy.deepcopy(model)
    history = flat(fit)(model, F.cross_entropy, Recorded(), epochs=epochs, lr=lr, batch_size=batch, **QUIET)

    steps = epochs * (len(plain) // batch)
    assert len(seen) == steps * batch
    for start in range(0, len(seen), steps // epochs * batch):
        epoch = seen[start : start + steps // epochs * batch]
        assert len(set(epoch)) == len(epoch)  # no sample twice in an epoch
    optimizer, losses = torch.optim.AdamW(reference.parameters(), lr=lr), []
    for step in range(steps):
        warm = round(0.1 * steps)
        factor = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
        optimizer.param_groups[0]["lr"] = lr * factor
        rows = seen[step * batch : (step + 1) * batch]
        loss = F.cross_entropy(reference(data.x[rows]), data.y[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    assert same(model, reference)
    expected = torch.tensor(losses).view(epochs, -1).mean(1)
    torch.testing.assert_close(torch.tensor([e.loss for e in history]), expected)
    assert [e.epoch for e in history] == [1, 2, 3]


@pytest.mark.parametrize("step", [0, 4, 6, 10])
def test_resumes_exactly(tmp_path: Path, step: int) -> None:
    options: dict[str, Any] = {"epochs": 3, "batch_size": 8, "seed": 3, **QUIET}
    whole, whole_loss = network(), Schedule()
    history = flat(fit)(whole, whole_loss, Pairs(), **options)

    stopped = network()
    with pytest.raises(Stop):
        flat(fit)(stopped, Schedule(), Pairs(), run_dir=tmp_path, hooks=[StopAt(step)], **options)
    torch.manual_seed(99)  # nothing of the first process is left
    resumed, loss = network(), Schedule()
    again = flat(fit)(resumed, loss, Pairs(), run_dir=tmp_path, resume=True, **options)
    assert same(resumed, whole) and not same(stopped, whole)
    assert loss.calls == whole_loss.calls
    assert [e.loss for e in again] == [e.loss for e in history]

    finished = network()
    assert flat(fit)(finished, Schedule(), Pairs(), run_dir=tmp_path, resume=True, **options) == again
    assert same(finished, whole)


def test_hooks_are_told_every_moment_in_order() -> None:
    told: list[tuple[str, Any]] = []

    class Told(Hook):
        def __init__(self, name: str) -> None:
            self.name = name

        def reschedule(self, timetable: Timetable) -> None:
            told.append((self.name, timetable.steps))

        def begin(self, run: TrainingRun) -> None:
            told.append((self.name, run.model))

        def after_step(self, step: int) -> None:
            told.append((self.name, step))

        def after_epoch(self, epoch: int) -> None:
            told.append((self.name, f"epoch {epoch}"))

    class ToldLoss(Told):
        def __call__(self, z: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(z, y)

    model = network()
    flat(fit)(model, ToldLoss("loss"), Pairs(), epochs=2, batch_size=16, hooks=[Told("a"), Told("b")], **QUIET)
    moments = [4, model, 0, 1, "epoch 1", 2, 3, "epoch 2"]
    assert told == [(name, moment) for moment in moments for name in ("a", "b", "loss")]


def test_a_run_with_other_hooks_is_not_continued(tmp_path: Path) -> None:
    class Named(Progress):
        def __init__(self, name: str) -> None:
            self.name = name

        def settings(self) -> dict[str, object]:
            return {"method": self.name}

    def run(*hooks: Hook, resume: bool = True) -> None:
        options: dict[str, Any] = {"run_dir": tmp_path, "epochs": 1, **QUIET}
        flat(fit)(network(), F.cross_entropy, Pairs(), hooks=hooks, resume=resume, **options)

    run(Named("a"), resume=False)
    with pytest.raises(RequestError, match="has method = a, not b"):
        run(Named("b"))
    with pytest.raises(RequestError, match="has method = a, not None"):
        run()
    with pytest.raises(RequestError, match="has Named, not Schedule, Named"):
        run(Schedule(), Named("a"))
    hook = Named("a")
    run(hook)
    assert hook.done == hook.steps == 1 and hook.fraction == 1.0


def test_phases_are_numbered_through_and_keep_their_states_apart(tmp_path: Path) -> None:
    def phase(part: dc.Run) -> list[Epoch]:
        return fit(network(), F.cross_entropy, Pairs(), dc.Training(epochs=2), part)

    made = in_phases([phase, phase], dc.Run(run_dir=tmp_path, **QUIET))
    assert [epoch.epoch for epoch in made] == [1, 2, 3, 4] and made[0].loss == made[2].loss
    assert sorted(path.parent.name for path in tmp_path.glob("*/training.pt")) == ["phase-1", "phase-2"]
    assert len(in_phases([phase], dc.Run(run_dir=tmp_path, **QUIET))) == 2 and (tmp_path / "training.pt").exists()
    assert len(in_phases([phase], dc.Run(**QUIET))) == 2


def test_ctrl_c_says_how_to_continue(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 3, "batch_size": 8, **QUIET}
    with pytest.raises(KeyboardInterrupt, match=f"after 1 of 3 epochs; continue with resume and run_dir {tmp_path}"):
        flat(fit)(
            network(), F.cross_entropy, Pairs(), run_dir=tmp_path, hooks=[StopAt(5, KeyboardInterrupt)], **options
        )
    with pytest.raises(KeyboardInterrupt, match="nothing was saved"):
        flat(fit)(network(), F.cross_entropy, Pairs(), hooks=[StopAt(5, KeyboardInterrupt)], **options)


def test_a_run_is_neither_overwritten_nor_mixed_up(tmp_path: Path) -> None:
    def run(model: nn.Module, **changes: Any) -> None:
        options: dict[str, Any] = {"epochs": 1, "batch_size": 8, "run_dir": tmp_path, **QUIET}
        flat(fit)(model, F.cross_entropy, Pairs(), **{**options, **changes})

    run(network())
    with pytest.raises(RequestError, match="holds a run already"):
        run(network())
    with pytest.raises(RequestError, match="epochs = 1, not 2"):
        run(network(), epochs=2, resume=True)
    with pytest.raises(RequestError, match="another model"):
        run(nn.Linear(6, 2), resume=True)
    with pytest.raises(RequestError, match="run_dir"):
        run(network(), run_dir=None, resume=True)
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    del state["hooks"]
    torch.save(state, tmp_path / "training.pt")
    with pytest.raises(RequestError, match="an older version"):
        run(network(), resume=True)
    (tmp_path / "training.pt").write_bytes(b"no checkpoint")
    with pytest.raises(RequestError, match="cannot be read"):
        run(network(), resume=True)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(DynCompressError, match=r"nan at step 2 of 4.*learning rate below 0.001"):
        losses = iter([1.0, 1.0, math.nan])
        flat(fit)(network(), lambda z, y: z.sum() * 0 + next(losses), Pairs(), epochs=1, batch_size=8, **QUIET)


@pytest.mark.parametrize("change", [{"epochs": 0}, {"lr": 0.0}, {"batch_size": -1}, {"seed": -1}, {"parameters": []}])
def test_wrong_arguments(change: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        flat(fit)(network(), F.cross_entropy, Pairs(), **{"epochs": 1, **QUIET, **change})


def test_wrong_data() -> None:
    for data, message in [(Pairs(0), "empty"), (Dataset(), "no length"), (torch.randn(8, 6), "pairs")]:
        with pytest.raises(RequestError, match=message):
            flat(fit)(network(), F.cross_entropy, data, epochs=1, **QUIET)  # type: ignore[arg-type]


def test_inputs_may_be_tuples_or_dicts() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a - b)

    losses = []
    for shape in (lambda x: (x, 2 * x), lambda x: {"a": x, "b": 2 * x}):
        torch.manual_seed(0)
        losses.append(flat(fit)(Two(), F.cross_entropy, Pairs(shape=shape), epochs=2, batch_size=8, **QUIET)[-1].loss)
    assert losses[0] == losses[1]


def test_groups_have_their_own_learning_rates_and_frozen_modules_stay() -> None:
    model = network().eval()
    before = copy.deepcopy(model)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[4].parameters()}]
    modes = []

    class Watch(Hook):
        def after_step(self, step: int) -> None:
            modes.append((model[1].training, model[3].training))

    flat(fit)(
        model, F.cross_entropy, Pairs(), epochs=1, parameters=groups, keep_eval=[model[1]], hooks=[Watch()], **QUIET
    )
    assert modes and set(modes) == {(False, True)}
    assert same(model[0], before[0]) and same(model[1], before[1]) and not same(model[4], before[4])
    assert not any(module.training for module in model.modules())  # as it came


def test_random_numbers_outside_are_left_alone_and_the_seed_decides() -> None:
    results = []
    for seed in (1, 1, 2):
        model = network()
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        flat(fit)(model, F.cross_entropy, Pairs(), epochs=1, batch_size=8, seed=seed, **QUIET)
        assert torch.equal(torch.rand(1), expected)
        results.append(model)
    assert same(results[0], results[1]) and not same(results[0], results[2])


def test_bf16_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        model = network()
        history = flat(fit)(model, F.cross_entropy, Pairs(), epochs=1, batch_size=8, mixed_precision="bf16", **QUIET)
        assert math.isfinite(history[0].loss)
        assert "forward" not in model.__dict__ and model.eval()(torch.zeros(2, 6)).dtype == torch.float32
        with pytest.raises(RequestError, match="mixed_precision"):
            flat(fit)(model, F.cross_entropy, Pairs(), epochs=1, mixed_precision="fp16", **QUIET)
    finally:
        AcceleratorState._reset_state(True)
