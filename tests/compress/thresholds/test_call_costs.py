"""Measured costs on a simulated clock, and the thresholds that follow from them, against plain loops."""

from typing import Any

import pytest
import torch
from cases import CASES, graph_with_exits
from dynamic_models import easy
from flat_options import flat
from torch import nn

import dyncompress as dc
from dyncompress.compress.exits.which_exits import search_exits
from dyncompress.compress.thresholds import call_costs
from dyncompress.compress.thresholds import choose_policy as choose
from dyncompress.compress.thresholds.call_costs import CallTimes, time_costs
from dyncompress.compress.thresholds.candidates import collect_cached
from dyncompress.compress.thresholds.choose_policy import choose_policy
from dyncompress.compress.thresholds.goal import Goal
from dyncompress.errors import RequestError
from dyncompress.passes.graph.copying import deep_copy
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import ExitPolicy

NEVER = ExitPolicy("max-softmax", (1.0,) * 3)


def clocked(monkeypatch: pytest.MonkeyPatch) -> DynamicModel:
    """A model on whose clock only convolutions, a second each, and heads, 10, 20 and 30 seconds, take time."""
    now = 0.0
    made = DynamicModel(deep_copy(graph_with_exits("resnet"))).eval()

    def takes(seconds: float) -> Any:
        def hook(*_: Any) -> None:
            nonlocal now
            now += seconds

        return hook

    for module in made.trunk.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(takes(1))
    for k, head in enumerate(made.trunk.exits.children(), 1):
        head.register_forward_hook(takes(10 * k))
    monkeypatch.setattr(call_costs, "perf_counter", lambda: now)
    return made


@pytest.mark.parametrize("batch", [1, 4])
def test_costs_on_a_simulated_clock(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = clocked(monkeypatch)
    _, data = easy()
    costs = time_costs(made, data, NEVER, batch=batch)
    convs = [sum("c1" in m or "c2" in m or "down" in m for m in called) for called in _called_by_stage(made)]
    assert costs.heads == pytest.approx([10_000 / batch, 20_000 / batch, 30_000 / batch])
    assert costs.static == pytest.approx(1000 * 11 / batch)  # the stem, four blocks of two, two shortcuts
    assert sum(costs.stages) == pytest.approx(costs.static)
    assert costs.stages[1:] == pytest.approx([1000 * n / batch for n in convs[1:]])


def _called_by_stage(made: DynamicModel) -> list[list[str]]:
    """The modules that each stage calls, read off its graph."""
    stages = made._pieces().stages
    return [[str(n.target) for n in stage.body.graph.nodes if n.op == "call_module"] for stage in stages]


def test_an_exit_that_is_slow_to_ask_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    made, data = easy()
    cached = collect_cached(made, data)
    by_macs = choose_policy(made, data, max_loss=0.3)
    assert by_macs.latency is None and by_macs.policy.thresholds[0] is not None
    slow = CallTimes((1.0, 1.0, 1.0, 1.0), (50.0, 0.1, 0.1), 4.0)
    monkeypatch.setattr(choose, "time_costs", lambda *_, **__: slow)
    found = choose_policy(made, data, max_loss=0.3, leaving=dc.Leaving(cost="latency"))
    assert made.policy.thresholds[0] is None and any(t is not None for t in made.policy.thresholds[1:])
    spent = 0.0
    for row in zip(*(z.unbind() for z in cached.logits), strict=True):  # one sample at a time
        for k, z in enumerate(row):
            spent += slow.stages[k]
            if k == 3:
                break
            spent += slow.heads[k] * made.policy.is_on(k)
            if made.policy.is_on(k) and bool(made.policy.decide(k, z[None])[0]):
                break
    assert found.latency is not None and found.latency.mean_ms == pytest.approx(spent / len(cached.labels))
    assert found.latency.static_ms == 4 and found.latency.batch == 1
    budget = choose_policy(made, data, latency=0.7)
    assert budget.latency is not None and budget.latency.mean_ms <= 0.7 * 4 + 1e-9
    assert made.policy.thresholds[0] is None
    with pytest.raises(RequestError, match=r"within 0\.2 of the static model's milliseconds, the least is 0\.53"):
        choose_policy(made, data, latency=0.2)


def test_a_search_drops_exits_that_are_slow_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    made, data = easy()
    slow = CallTimes((1.0, 1.0, 1.0, 1.0), (50.0, 0.01, 50.0), 4.0)
    monkeypatch.setattr("dyncompress.compress.exits.which_exits.time_costs", lambda *_, **__: slow)
    kept, report = search_exits(made, data, Goal(max_loss=0.6, leaving=dc.Leaving(cost="latency")))
    assert list(report.kept) == kept.exits == made.exits[1:2]
    assert report.mean_latency_share is not None and 0.5 <= report.mean_latency_share < 1
    assert report.mean_macs_share is None


def test_measured_costs_are_those_of_a_call() -> None:
    made = DynamicModel(deep_copy(graph_with_exits("resnet"))).eval()
    made.train()
    costs = time_costs(made, [(x, 0) for x in CASES["resnet"].batch(40)], NEVER)  # type: ignore[arg-type]
    assert made.training and all(ms > 0 for ms in (*costs.stages, *costs.heads, costs.static))
    assert sum(costs.stages) == pytest.approx(costs.static, rel=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": "time"}, "unknown cost 'time': give macs or latency"),
        ({"macs": 0.5, "cost": "latency"}, "a budget of macs cannot have the least latency"),
        ({"latency": 0.5, "cost": "macs"}, "a budget of latency cannot have the least macs"),
        ({"macs": 0.5, "latency": 0.5}, "macs and latency cannot both be kept"),
        ({"latency": 1.5}, "latency is 1.5: give a share"),
        ({"latency_batch": 0}, "latency_batch is 0"),
    ],
)
def test_wrong_goals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        flat(Goal)(**options)


def test_no_data() -> None:
    made = DynamicModel(graph_with_exits("resnet")).eval()
    with pytest.raises(RequestError, match="empty"):
        time_costs(made, torch.utils.data.TensorDataset(torch.zeros(0, 3, 16, 16), torch.zeros(0)), NEVER)
