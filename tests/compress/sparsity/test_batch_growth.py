"""Batches that grow as the model shrinks: memory counted on the real steps, the schedule by hand, exact resumption."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data import stripes
from flat_options import flat
from nets import seeded
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from trained import SPARSIFY, same, stopped

import dyncompress as dc
from dyncompress.compress.sparsity import sparsifier
from dyncompress.compress.sparsity.group_lasso import GroupLasso
from dyncompress.compress.training import trainer
from dyncompress.compress.training.batch_growth import bytes_per_sample, largest_batch
from dyncompress.compress.training.losses import cross_entropy
from dyncompress.compress.training.schedule import Timetable

GROWING: dict[str, Any] = SPARSIFY | {
    "macs": 0.2, "epochs": 4, "finetune": 2, "shrink_every": 1, "batch_size": 16, "ema": 0.9, "grow_batch": True,
}  # fmt: skip
SAMPLES = 192
AUTOCAST = torch.autocast("cpu", enabled=False)


def batches(small: Any) -> list[int]:
    return small.meta["info"]["sparsify"]["batch_sizes"]


class Steps:
    """A loss that notes, for every training step, its samples and the bytes of activations kept by then."""

    def __init__(self) -> None:
        self.kept: dict[int, torch.UntypedStorage] = {}
        self.seen: list[tuple[int, int]] = []

    def pack(self, tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if not isinstance(base, nn.Parameter):
            self.kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    def __call__(self, output: Any, labels: Tensor) -> Tensor:
        value = cross_entropy(output, labels)
        self.seen.append((len(labels), sum(storage.nbytes() for storage in self.kept.values())))
        self.kept.clear()
        return value


@pytest.fixture(scope="module")
def grown() -> Iterator[Any]:
    """A run with growing batches, and what its steps kept."""
    torch.set_num_threads(1)
    steps = Steps()
    with saved_tensors_hooks(steps.pack, lambda tensor: tensor):
        small = flat(dc.sparsify)(seeded(), stripes(), loss_fn=steps, **GROWING)
    yield small, steps.seen


def test_every_epoch_has_the_largest_batch_that_needs_no_more_memory_than_the_first(grown: Any) -> None:
    small, seen = grown
    sizes = batches(small)
    assert sizes[0] == 16 < sizes[-1] and sizes == sorted(sizes) and all(size % 4 == 0 for size in sizes)
    assert [size for size, _ in seen] == [size for size in sizes for _ in range(SAMPLES // size)]
    first = seen[0][1]
    for size, kept in seen:
        assert kept <= first < kept / size * (size + 4) * 1.01  # 1 %: what is kept per batch, such as means of norms


@pytest.mark.parametrize("width", [12, 5])
def test_bytes_per_sample_by_hand(width: int) -> None:
    gm = dc.capture(seeded(), stripes().tensors[0][:2])
    model = dc.shrink(gm, {"stem.weight:0": list(range(width))}) if width < 12 else gm
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pixels = 8 * 8
    convolutions = 1 + width + 10  # their inputs; the last two are what the activations put out
    norms = 10 + width  # their inputs
    floats = (convolutions + norms + width) * pixels  # the last activation, after the sum, which keeps nothing
    floats += width + 3  # the classifier's input; the logits
    assert bytes_per_sample(model.train(), stripes(), AUTOCAST) == 4 * floats
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())  # norms, too


def test_batches_are_quarters_of_the_first_rounded_down() -> None:
    assert [largest_batch(128, 1000, now, 10**6) for now in (1000, 801, 800, 501, 500, 1001)] == [
        128, 128, 160, 224, 256, 128,
    ]  # fmt: skip
    assert largest_batch(6, 100, 66, 10**6) == 9 and largest_batch(6, 100, 80, 10**6) == 7
    assert largest_batch(128, 1000, 100, 300) == 300


def test_nothing_grows_where_nothing_leaves() -> None:
    options = GROWING | {"macs": None, "strength": 1e-6, "epochs": 2, "finetune": 1}
    small, plain = (flat(dc.sparsify)(seeded(), stripes(), **options | {"grow_batch": grow}) for grow in (True, False))
    assert batches(small) == [16] * 3 and small.meta["info"]["sparsify"]["surgeries"] == []
    assert same(small, plain)


def test_the_batch_stays_within_the_data() -> None:
    small = flat(dc.sparsify)(seeded(), stripes(20), **GROWING)
    assert batches(small)[0] == 16 and batches(small)[-1] == 20


def test_the_learning_rate_grows_with_the_batch_and_the_cosine_ends_with_the_epochs() -> None:
    sizes = (16, 16, 24, 40)
    table = Timetable(SAMPLES, 2, 0.1, sizes)
    expected = []
    for epoch, size in enumerate(sizes):
        count = SAMPLES // 2 // size
        for step in range(count):
            done = (epoch + step / count) / 4  # share of all epochs
            warm = 2 / 24  # 2 of the 4 * 6 steps that the first batch would have
            rate = (24 * done + 1) / 2 if done < warm else (1 + math.cos(math.pi * (done - warm) / (1 - warm))) / 2
            expected.append(0.1 * rate * size / 16)
    assert table.lrs == pytest.approx(expected) and len(expected) == table.steps == 6 + 6 + 4 + 2
    assert [table.steps_after(epochs) for epochs in (0, 2, 2.5, 3, 4)] == [0, 12, 14, 16, 18]
    assert table.with_batches(3, 48).batch_sizes == (16, 16, 24, 48) and table.growth == 2.5


def test_training_and_group_lasso_follow_the_grown_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser's learning rates, and what the proximal steps take off, are those of the schedule by hand."""
    seen: list[float] = []
    taken: list[float] = []
    bars: list[Any] = []
    averaged: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, *args: Any) -> None:
            seen.append(self.param_groups[0]["lr"])
            super().step(*args)

    def proximal(self: Any, step: float, real: Any = GroupLasso.proximal_) -> Tensor:
        taken.append(step)
        return real(self, step)

    def lerp(own: Any, new: Any, weight: float, real: Any = torch._foreach_lerp_) -> None:
        averaged.append(weight)
        real(own, new, weight)

    def bar(*args: Any, real: Any = trainer.tqdm, **options: Any) -> Any:
        bars.append(real(*args, **options))
        return bars[-1]

    monkeypatch.setattr(GroupLasso, "proximal_", proximal)
    monkeypatch.setattr(torch, "_foreach_lerp_", lerp)
    monkeypatch.setattr(trainer, "tqdm", bar)
    options = GROWING | {"macs": None, "strength": 0.8, "optimizer": Watched, "lr": 0.05, "progress": True}
    sizes = batches(flat(dc.sparsify)(seeded(), stripes(), **options))
    assert sizes[0] < sizes[-1]
    table = Timetable(SAMPLES, 1, 0.05, tuple(sizes))
    assert seen == pytest.approx(table.lrs)
    learning = sum(SAMPLES // size for size in sizes[:4])
    assert taken[:learning] == pytest.approx([0.8 * lr for lr in seen[:learning]]) and set(taken[learning:]) == {0.0}
    growths = [size / sizes[0] for size in sizes for _ in range(SAMPLES // size)]
    assert averaged == pytest.approx([1 - 0.9**growth for growth in growths])
    assert bars[0].n == bars[0].total == len(seen)


def test_the_horizon_is_that_of_the_steps_to_come() -> None:
    """As much learning rate is left to the deadline, which stays at the same epoch, however large the batches are."""
    request = sparsifier.Request(
        metric="macs", target=0.5, epochs=10, finetune=0, kinds=("axes",), distill=0.0,
        lasso=dc.Lasso(shrink_every=1, grow_batch=True), limits=dc.Limits(round_to=1),
    )  # fmt: skip
    work = sparsifier.Sparsifier(dc.capture(seeded(), stripes().tensors[0][:2]), request, cross_entropy, stripes())
    left = []
    for table in (Timetable(960, 1, 0.1, (16,) * 10), Timetable(960, 1, 0.1, (16,) * 2 + (32,) * 8)):
        work.reschedule(table)
        left.append(sparsifier.horizon(work._lrs, 120, work._deadline))
        by_hand = sum(table.lrs[120 : 120 + 4 * (960 // table.batch_sizes[2])])  # epochs 3 to 6 of 10
        assert left[-1] == pytest.approx(by_hand)
    assert left[1] == pytest.approx(left[0], rel=0.02)


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path: Path, grown: Any) -> None:
    """Stopped in the first epoch of a larger batch, and again in the last; killed runs are in test_sparsify_runs."""
    whole, seen = grown
    first = next(step for step, (size, _) in enumerate(seen) if size > 16)
    left = len(seen) - first  # steps, once resumed: an epoch that was not done begins anew
    for step, resume in ((first + 2, False), (left - 2, True)):
        with pytest.raises(KeyboardInterrupt, match="continue with resume"):
            flat(dc.sparsify)(seeded(), stripes(), loss_fn=stopped(step), run_dir=tmp_path, resume=resume, **GROWING)
    again = flat(dc.sparsify)(seeded(), stripes(), run_dir=tmp_path, resume=True, **GROWING)
    assert same(again, whole) and again.meta["info"]["sparsify"] == whole.meta["info"]["sparsify"]
    with pytest.raises(dc.RequestError, match="has grow_batch = True, not False"):
        flat(dc.sparsify)(seeded(), stripes(), run_dir=tmp_path, resume=True, **GROWING | {"grow_batch": False})
