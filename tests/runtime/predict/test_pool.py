"""Streams of batches against predict on each of them; proof that deep stages run full and that nobody waits long."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from cases import CASES, call, graph, rows
from dynamic_models import policy_for, rows_seen, spread
from torch import Tensor, nn

from dyncompress.errors import RequestError
from dyncompress.passes.capture.capture import capture
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.passes.graph.copying import deep_copy
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import ExitPolicy

SIZES = (1, 3, 7, 1, 1, 20, 2, 5)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def half_leave(name: str) -> DynamicModel:
    """A model at whose exits about half of the samples there leave."""
    made = spread(name)
    made.policy = policy_for(made, CASES[name].batch(40), "max-softmax", CASES[name].exits)
    return made


def check_stream(made: DynamicModel, batches: list[Any], **options: Any) -> list[int]:
    """Holds every answer to predict on its batch, in order; the exits of all samples."""
    answers = list(made.predict_stream(iter(batches), **options))
    exits: list[int] = []
    for batch, found in zip(batches, answers, strict=True):
        wanted = call(made.predict, batch)
        assert found.exit_index.tolist() == wanted.exit_index.tolist()
        assert found.exit_index.dtype == torch.int64 and not found.logits.requires_grad
        assert found.macs.tolist() == wanted.macs.tolist()
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
        exits += found.exit_index.tolist()
    return exits


# --- answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("max_wait_ms", [None, 0, 1000])
def test_a_stream_answers_as_predict_does(name: str, max_wait_ms: float | None) -> None:
    batches = [CASES[name].batch(n) for n in SIZES]
    batches.insert(3, rows(CASES[name].batch(2), slice(0, 0)))
    made = half_leave(name)
    exits = check_stream(made, batches, max_batch=8, max_wait_ms=max_wait_ms)
    assert set(exits) == set(range(CASES[name].exits + 1))
    made.policy = ExitPolicy.never(CASES[name].exits)
    assert set(check_stream(made, batches[:3], max_batch=8)) == {CASES[name].exits}


@pytest.mark.parametrize("rule", ["patience", "learned"])
def test_rules_with_memory_remember_each_sample(rule: str) -> None:
    made, thresholds, weights = spread("text"), (1.0, 1.0), ()
    if rule == "learned":  # only agreement counts: 1/2 without, .73 with one
        thresholds, weights = (0.7, 0.7), ((0.0, 0.0, 0.0, 2.0, 0.0),) * 2
    made.policy = ExitPolicy(rule, thresholds, (), weights)
    batches = [CASES["text"].batch(n) for n in SIZES]
    assert set(check_stream(made, batches, max_batch=5)) == {1, 2}


def test_answers_that_later_exits_read_travel_along() -> None:
    gm = InsertExits(3, head="cascade")(graph("resnet")).gm
    made = DynamicModel(gm).eval()
    batches = [CASES["resnet"].batch(n) for n in SIZES]
    made.policy = policy_for(made, torch.cat(batches), "entropy", 3)
    assert set(check_stream(made, batches, max_batch=6)) == {0, 1, 2, 3}


def test_other_lengths_wait_apart() -> None:
    made = half_leave("text")
    batches = []
    for n, length in ((3, 7), (4, 11), (2, 7), (5, 9), (1, 11), (6, 7)):
        lengths = torch.randint(1, length + 1, (n, 1))
        ids = torch.randint(0, 50, (n, length))
        batches.append({"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()})
    assert set(check_stream(made, batches, max_batch=4)) == {0, 1, 2}


class Scaled(nn.Module):
    """A second input without a batch, which the end of the network reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.fc(x * scale)


def test_other_values_without_a_batch_wait_apart() -> None:
    made = DynamicModel(InsertExits(1)(capture(Scaled(), (torch.randn(2, 6), torch.ones(6)))).gm).eval()
    made.policy = ExitPolicy("max-softmax", (1.0,))
    one, two = torch.rand(6), torch.rand(6)
    batches = [(torch.randn(3, 6), scale) for scale in (one, two, one.clone(), two, one)]
    assert set(check_stream(made, batches, max_batch=4)) == {1}


# --- work --------------------------------------------------------------------------------------------------------


def test_stages_run_full_batches() -> None:
    made = half_leave("resnet")
    batches = list(CASES["resnet"].batch(90).split(3))
    at = torch.cat([made.predict(x).exit_index for x in batches])
    paths = ["stem.0", "exits.0", "blocks.1.c1", "blocks.2.c2", "blocks.3.c2"]
    with rows_seen(made, paths) as seen:
        list(made.predict_stream(batches, max_batch=8))
    for path, k in zip(paths, (0, 0, 1, 2, 3), strict=True):
        reached = int((at >= k).sum())
        assert sum(seen[path]) == reached and seen[path][:-1] == [8] * (len(seen[path]) - 1)
    assert len(seen["blocks.1.c1"]) > 3


def test_answers_come_before_the_stream_ends() -> None:
    made, read = half_leave("resnet"), []

    def batches() -> Iterator[Tensor]:
        for _ in range(100):
            read.append(len(read))
            yield CASES["resnet"].batch(4)

    next(made.predict_stream(batches(), max_batch=8))
    assert 2 <= len(read) < 60


# --- time --------------------------------------------------------------------------------------------------------


def test_nobody_waits_longer_for_others_than_asked() -> None:
    """The source gives one sample that runs to the end, and nothing more until it is answered."""
    made, answered = spread("resnet"), threading.Event()
    made.policy = ExitPolicy("max-softmax", (1.0, 1.0, 1.0))
    x = CASES["resnet"].batch(3)

    def batches() -> Iterator[Tensor]:
        yield x[:1]
        assert answered.wait(60)
        yield x[1:]

    begin = time.perf_counter()
    stream = made.predict_stream(batches(), max_batch=64, max_wait_ms=50)
    first = next(stream)
    assert time.perf_counter() - begin >= 0.05
    answered.set()
    assert [len(p.logits) for p in (first, *stream)] == [1, 2] and first.exit_index.tolist() == [3]


def test_those_who_wait_too_long_take_the_others_along() -> None:
    """A first sample that stays is overtaken by none: later ones, too few to fill a stage, leave with it."""
    made, paths = spread("resnet"), ["blocks.1.c1"]
    made.policy = ExitPolicy("max-softmax", (1.0, None, None))
    with rows_seen(made, paths) as seen:
        stream = made.predict_stream(iter(CASES["resnet"].batch(6).split(2)), max_batch=4, max_wait_ms=200)
        assert [p.exit_index.tolist() for p in stream] == [[3, 3]] * 3
    assert seen["blocks.1.c1"] == [4, 2]


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_wait_ms", [None, 1000])
def test_what_came_before_a_mistake_is_answered(max_wait_ms: float | None) -> None:
    made, x = half_leave("resnet"), CASES["resnet"].batch(4)
    stream = made.predict_stream([x, x, x[:, :1], x], max_wait_ms=max_wait_ms)
    assert torch.equal(next(stream).exit_index, next(stream).exit_index)
    with pytest.raises(RequestError, match=r"shape \(4, 1, 16, 16\); the model takes \(batch, 3, 16, 16\)"):
        next(stream)

    def broken() -> Iterator[Tensor]:
        yield x
        raise OSError("the camera is gone")

    stream = made.predict_stream(broken(), max_wait_ms=max_wait_ms)
    assert next(stream).exit_index.tolist() == made.predict(x).exit_index.tolist()
    with pytest.raises(OSError, match="the camera is gone"):
        next(stream)


def test_a_stream_that_is_dropped_stops_reading() -> None:
    made, read = half_leave("resnet"), []

    def forever() -> Iterator[Tensor]:
        while True:
            read.append(0)
            yield CASES["resnet"].batch(4)

    stream = made.predict_stream(forever(), max_batch=4, max_wait_ms=1)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 30
    while any(t.name == "dyncompress-stream" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    count = len(read)
    time.sleep(0.05)
    assert len(read) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_wait_ms": -1}, "max_wait_ms is -1"),
        ({"max_wait_ms": float("nan")}, "nan"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        spread("resnet").predict_stream([], **options)


# --- threads -----------------------------------------------------------------------------------------------------


def together(*work: Callable[[], None]) -> None:
    """Runs each in a thread of its own; what one raises is raised here."""
    with ThreadPoolExecutor(len(work)) as threads:
        for done in [threads.submit(each) for each in work]:
            done.result(60)


def test_threads_share_a_model() -> None:
    """Eight of them with policies and inputs of their own, all at once, on a model whose stages nobody derived yet."""
    made = spread("resnet")
    inputs = [CASES["resnet"].batch(2 + i) for i in range(8)]
    policies = [policy_for(made, CASES["resnet"].batch(20), "max-softmax", 3) for _ in inputs]
    wanted = [made.with_policy(policy).predict(x) for policy, x in zip(policies, inputs, strict=True)]
    made, start = deep_copy(made), threading.Barrier(8)

    def work(i: int) -> None:
        start.wait(60)
        for _ in range(10):
            found = made.with_policy(policies[i]).predict(inputs[i])
            assert torch.equal(found.exit_index, wanted[i].exit_index)
            assert torch.equal(found.logits, wanted[i].logits)

    together(*(partial(work, i) for i in range(8)))


def test_a_thread_that_is_done_leaves_the_others_in_evaluation_mode() -> None:
    made, x = spread("resnet").train(), CASES["resnet"].batch(4)
    wanted, statistics = made.predict(x).logits, made.trunk.get_submodule("blocks.3.b1").running_mean.clone()
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    names = {}

    def before_the_second_block(*_: Any) -> None:
        if names[threading.get_ident()] == "first":
            first_in.set()
            assert second_in.wait(60)
        else:
            second_in.set()
            assert first_out.wait(60)

    made.trunk.get_submodule("blocks.1.c1").register_forward_pre_hook(before_the_second_block)

    def first() -> None:
        names[threading.get_ident()] = "first"
        made.predict(x)
        first_out.set()

    def second() -> None:
        names[threading.get_ident()] = "second"
        assert first_in.wait(60)
        assert torch.equal(made.predict(x).logits, wanted)

    together(first, second)
    assert torch.equal(made.trunk.get_submodule("blocks.3.b1").running_mean, statistics)
    assert all(module.training for module in made.trunk.modules())
