"""Budgets of MACs and deadlines in milliseconds, kept by `predict`."""

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, graph_with_exits

from dyncompress.errors import RequestError
from dyncompress.passes.graph.copying import deep_copy
from dyncompress.runtime.predict import deadline as deadline_module
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import ExitPolicy, OperatingPolicy


def test_a_budget_picks_its_policy() -> None:
    made = DynamicModel(graph_with_exits("resnet")).eval()
    first, second, third = (ExitPolicy("margin", t) for t in ((0.0, None, None), (None, 0.0, None), (None, None, 0.0)))
    made.table = (OperatingPolicy(100, 0.6, first), OperatingPolicy(200, 0.8, second), OperatingPolicy(300, 0.7, third))
    x = CASES["resnet"].batch(3)
    for budget, wanted in ((100, 0), (199.9, 0), (250, 1), (1e9, 1)):
        assert made.predict(x, budget=budget).exit_index.tolist() == [wanted] * 3
    assert made.predict(x).exit_index.tolist() == [3] * 3  # the model's own policy stays
    assert deep_copy(made).predict(x, budget=150).exit_index.tolist() == [0] * 3
    with pytest.raises(RequestError, match="a budget of 99 MACs is below the least, 100"):
        made.predict(x, budget=99)
    with pytest.raises(RequestError, match="no table of budgets"):
        DynamicModel(graph_with_exits("resnet")).eval().predict(x, budget=99)
    with pytest.raises(RequestError, match="the policy has 1 thresholds"):
        made.table = (OperatingPolicy(100, 0.6, ExitPolicy("margin", (0.0,))),)


class Clock:
    """Time that passes only in the modules of a model: `each[k]` seconds in stage k."""

    def __init__(self, made: DynamicModel, paths: list[str], each: list[float]) -> None:
        self.now = 0.0
        for path, seconds in zip(paths, each, strict=True):
            made.trunk.get_submodule(path).register_forward_pre_hook(lambda *_, s=seconds: self.pass_(s))

    def pass_(self, seconds: float) -> None:
        self.now += seconds


ONE_PER_STAGE = ["stem.0", "blocks.1.c1", "blocks.2.c2", "blocks.3.c2"]


@pytest.mark.parametrize(
    ("deadline_ms", "policy", "wanted"),
    [
        (1, None, 0),  # the first stage always runs
        (9999, None, 3),
        (1e9, (None, 0.0, None), 1),  # who is sure leaves all the same
    ],
)
def test_the_deadline_decides(deadline_ms: float, policy: Any, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = DynamicModel(deep_copy(graph_with_exits("resnet"))).eval()
    made.policy = ExitPolicy("margin", policy or (None, None, None))
    clock, x = Clock(made, ONE_PER_STAGE, [0.1] * 4), CASES["resnet"].batch(4)
    monkeypatch.setattr(deadline_module, "perf_counter", lambda: clock.now)
    found = made.predict(x, deadline_ms=deadline_ms)
    assert found.exit_index.tolist() == [wanted] * 4
    torch.testing.assert_close(found.logits, made.all_logits(x)[wanted], rtol=1e-4, atol=1e-5)
    assert found.macs.tolist() == [made.exit_macs[wanted]] * 4


def test_a_stage_that_would_end_late_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    made = DynamicModel(deep_copy(graph_with_exits("resnet"))).eval()
    macs = [made.exit_macs[0], *(b - a for a, b in itertools.pairwise(made.exit_macs))]
    clock, x = Clock(made, ONE_PER_STAGE, [m / 1e6 for m in macs]), CASES["resnet"].batch(4)  # 1 s per million MACs
    monkeypatch.setattr(deadline_module, "perf_counter", lambda: clock.now)
    for k in range(1, 4):
        for milliseconds, wanted in ((made.exit_macs[k] / 1e3 + 1, k), (made.exit_macs[k] / 1e3 - 1, k - 1)):
            clock.now = 0.0
            assert set(made.predict(x, deadline_ms=milliseconds).exit_index.tolist()) == {wanted}
            assert clock.now * 1e3 <= milliseconds


def test_calls_end_by_the_deadline_and_one_stage() -> None:
    """Wall clock: of 200 calls, 99 % are no later than the deadline and the slowest stage of the same call."""
    made = DynamicModel(deep_copy(graph_with_exits("resnet"))).eval()
    x, began = CASES["resnet"].batch(64), []
    for stage in made._pieces().stages:
        stage.body.register_forward_pre_hook(lambda *_: began.append(time.perf_counter()))
    made.predict(x, deadline_ms=1e6)
    whole = (time.perf_counter() - began[0]) * 1e3
    random, late, answered = np.random.default_rng(0), 0, set()
    for deadline_ms in random.uniform(0.05, 1.2, 200) * whole:
        began.clear()
        start = time.perf_counter()
        found = made.predict(x, deadline_ms=deadline_ms)
        end = time.perf_counter()
        slowest = max(b - a for a, b in itertools.pairwise([*began, end]))
        late += end - start > deadline_ms / 1e3 + slowest
        answered |= set(found.exit_index.tolist())
    assert late <= 2 and len(answered) >= 3


def test_wrong_deadlines() -> None:
    made = DynamicModel(graph_with_exits("resnet")).eval()
    for wrong in (0, -1, math.nan):
        with pytest.raises(RequestError, match="give a positive number of milliseconds"):
            made.predict(CASES["resnet"].batch(1), deadline_ms=wrong)
