"""Shares, listed candidates and the genetic search against plain loops; budgets and deadlines at run time."""

import itertools
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exit_models import CASES, graph_with_exits
from test_thresholds import draw, every_choice, simulate
from torch import Tensor
from torch.utils.data import TensorDataset

from dyncompress.compress.thresholds import candidates
from dyncompress.compress.thresholds.candidates import Cached, Candidates, by_genetic_search, by_one_threshold, by_quota
from dyncompress.compress.thresholds.choose_policy import choose_policy
from dyncompress.compress.thresholds.learned_score import fit_scorer
from dyncompress.compress.thresholds.quotas import quota_shares, shares_of, thresholds_for_shares
from dyncompress.errors import RequestError
from dyncompress.passes.graph.copying import deep_copy
from dyncompress.runtime.files.checkpoint import describe, load, save
from dyncompress.runtime.files.tensor_file import write_file
from dyncompress.runtime.files.tensor_table import encode_tensors
from dyncompress.runtime.predict import deadline as deadline_module
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import RULES, ExitPolicy, OperatingPolicy


def cached(samples: int = 200, early: int = 3, seed: int = 0) -> Cached:
    return Cached(*draw(samples, early, seed))


def template(rule: str, data: Cached) -> ExitPolicy:
    exits = len(data.head_costs)
    if rule == "learned":
        return fit_scorer(data.logits, data.labels, (1.0,) * exits)
    return ExitPolicy(rule, (RULES[rule].bounds[0],) * exits)


# --- shares ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["max-softmax", "entropy", "margin", "energy"])
def test_the_surest_share_leaves(rule: str) -> None:
    data, wanted = cached(), (0.3, 0.5, 0.25)
    policy = thresholds_for_shares(template(rule, data), data.logits, wanted)
    at = policy.exit_of(data.logits)
    assert torch.bincount(at, minlength=4).tolist() == [60, 70, 18, 52]  # 0.3 of 200, 0.5 of 140, 0.25 of 70 -> 18
    sign = 1 if RULES[rule].high_leaves else -1
    for k in range(3):
        score = sign * policy.score(k, data.logits[k])[0]
        assert score[at == k].min() > score[at > k].max()
    again = thresholds_for_shares(policy, data.logits, shares_of(policy, data.logits))
    assert torch.equal(again.exit_of(data.logits), at)


def test_shares_of_rules_with_memory() -> None:
    data = cached()
    patient = thresholds_for_shares(template("patience", data), data.logits, (0.5, 0.0, 0.01))
    assert patient.thresholds == (1.0, 2.0, 2.0)  # no exit can agree with none; the second only watches
    assert set(patient.exit_of(data.logits).tolist()) == {2, 3}
    off = thresholds_for_shares(template("learned", data), data.logits, (None, 0.4, 1.0))
    assert off.thresholds[0] is None
    assert torch.bincount(off.exit_of(data.logits), minlength=4).tolist() == [0, 80, 120, 0]


def test_equal_scores_leave_together() -> None:
    z = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    policy = thresholds_for_shares(ExitPolicy("margin", (0.0,)), [z, z], [0.5])
    assert policy.exit_of([z, z]).tolist() == [0, 0, 0, 1]


def test_quotas_are_proportional_to_powers() -> None:
    for p, shares in enumerate(quota_shares(3), 1):
        left, parts = 1.0, []
        for share in shares:
            parts.append(left * share)
            left -= parts[-1]
        q = p / 20
        whole = q + q**2 + q**3 + q**4
        np.testing.assert_allclose([*parts, left], [q / whole, q**2 / whole, q**3 / whole, q**4 / whole])
    assert p == 39


# --- candidates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["max-softmax", "entropy", "patience"])
def test_one_threshold_for_all_exits(rule: str) -> None:
    data = cached(samples=60)
    policies = by_one_threshold(template(rule, data), data)
    assert all(len(set(policy.thresholds)) == 1 for policy in policies) and policies[-1].thresholds == (None,) * 3
    assert len(policies) == (181 if rule != "patience" else 3)  # every score of three exits; 1 or 2 that agree
    found = Candidates(policies, data).for_cost(50)
    low, high = RULES[rule].bounds[0], min(RULES[rule].bounds[1], 3.5)
    fine = [data.play(replace(policies[0], thresholds=(t,) * 3)) for t in np.linspace(low, high, 700).tolist()]
    assert found.accuracy >= max(p.accuracy for p in fine if p.mean_cost <= 50)


def test_candidates_are_played_like_a_plain_loop() -> None:
    data = cached()
    search = Candidates(by_quota(template("max-softmax", data), data), data)
    raw = (list(data.logits), data.labels, list(data.stage_costs), list(data.head_costs))
    played = {t: simulate(raw, t, "max-softmax") for t in search.thresholds}
    assert len(played) > 30 and (None,) * 3 in played
    point = search.for_cost(50)
    assert (-point.accuracy, point.mean_cost) == pytest.approx(min((-a, m) for a, m in played.values() if m <= 50))
    assert (point.accuracy, point.mean_cost) == pytest.approx(played[point.thresholds])
    floor = max(a for a, _ in played.values()) - 0.05
    assert search.for_accuracy(floor).mean_cost == pytest.approx(min(m for a, m in played.values() if a >= floor))
    assert search.best_accuracy == pytest.approx(max(a for a, _ in played.values()))
    curve = [(p.mean_cost, p.accuracy) for p in search.curve(100)]
    front = [
        (m, a)
        for a, m in played.values()
        if not any(b >= a and n <= m and (a, m) != (b, n) for b, n in played.values())
    ]
    assert curve == [pytest.approx(p) for p in sorted(set(front))]
    half = search.subset(np.arange(100))
    part = ([z[:100] for z in data.logits], data.labels[:100], raw[2], raw[3])
    assert half.for_accuracy(0).mean_cost == pytest.approx(min(simulate(part, t, "max-softmax")[1] for t in played))
    with pytest.raises(RequestError, match="the best is"):
        search.for_accuracy(1.01)
    with pytest.raises(RequestError, match="the least is"):
        search.for_cost(1)


def test_the_genetic_search_comes_near_the_best_of_all_choices() -> None:
    data = cached(60, 2)
    raw = (list(data.logits), data.labels, list(data.stage_costs), list(data.head_costs))
    everything = [simulate(raw, t, "max-softmax") for t in every_choice(raw[0], "max-softmax", 12)]
    search = Candidates(by_genetic_search(template("max-softmax", data), data), data)
    for macs in (30, 45, 60):
        best = max(a for a, m in everything if m <= macs)
        assert search.for_cost(macs).accuracy >= best - 0.02


def test_the_genetic_search_finds_every_patience() -> None:
    data = cached(300)
    search = Candidates(by_genetic_search(template("patience", data), data), data)
    choices: list[tuple[Any, ...]] = list(itertools.product([None, 1, 2, 3], repeat=3))
    played = [data.play(ExitPolicy("patience", t)) for t in choices]
    for macs in (40, 60, 80):
        best = max((p.accuracy for p in played if p.mean_cost <= macs), default=None)
        if best is None:
            with pytest.raises(RequestError):
                search.for_cost(macs)
        else:
            assert search.for_cost(macs).accuracy == pytest.approx(best)


def test_the_learned_score_knows_who_may_leave() -> None:
    data, unseen = cached(1500), cached(1500, seed=1)
    policy = fit_scorer(data.logits, data.labels, (1.0, 1.0, 1.0))
    final_wrong = unseen.logits[-1].argmax(-1) != unseen.labels
    state: tuple[Tensor, ...] = ()
    for k, z in enumerate(unseen.logits[:-1]):
        score, state = policy.score(k, z, state)
        safe = (z.argmax(-1) == unseen.labels) | final_wrong
        order = score.argsort()
        thirds = [safe[part].double().mean().item() for part in order.chunk(3)]
        assert thirds == sorted(thirds) and thirds[2] > thirds[0] + 0.15
        assert float(score.mean()) == pytest.approx(float(safe.double().mean()), abs=0.04)  # a probability


def test_a_score_with_nothing_to_tell_apart() -> None:
    z = torch.eye(3)
    policy = fit_scorer([z, z], torch.arange(3), (1.0,))
    assert policy.weights == ((0.0, 0.0, 0.0, 0.0, math.log(4)),)


# --- choosing ----------------------------------------------------------------------------------------------------


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """Least squares with a penalty: channels that never fire leave it one answer, whatever the rounding."""
    x, y = x.double(), y.double()
    return torch.linalg.solve(x.T @ x + 1e-3 * torch.eye(x.shape[1]), x.T @ y).float()


def easy() -> tuple[DynamicModel, TensorDataset]:
    """An untrained model and labels that its end mostly gives, its exits less often."""
    torch.manual_seed(0)
    made = DynamicModel(deep_copy(graph_with_exits("resnet"))).eval()
    x = CASES["resnet"].batch(600)
    final = made.all_logits(x)[-1]
    for k, head in enumerate(made.trunk.exits.children()):
        features: list[Tensor] = []
        hook = head.linear.register_forward_pre_hook(lambda _, inputs, kept=features: kept.append(inputs[0]))
        made.all_logits(x)
        hook.remove()
        fitted = ridge(torch.cat([features[0], torch.ones(600, 1)], 1), final - final.mean(0))
        head.linear.weight.data, head.linear.bias.data = (4 + k) * fitted[:-1].T, (4 + k) * fitted[-1]
    labels = (final - final.mean(0)).argmax(-1)
    made.trunk.fc.bias.data -= final.mean(0)
    return made, TensorDataset(x, torch.where(torch.rand(600) < 0.05, (labels + 1) % 10, labels))


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        ("margin", None),
        ("energy", "quota"),
        ("patience", None),
        ("learned", "genetic"),
        ("max-softmax", "quota"),
        ("margin", "uniform"),
    ],
)
def test_every_rule_can_be_chosen(rule: str, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_TRIALS", 80)
    made, data = easy()
    report = choose_policy(made, data, rule=rule, threshold_search=kind, max_loss=0.3)
    found, labels = made.predict(data.tensors[0]), data.tensors[1]
    accuracy = (found.logits.argmax(-1) == labels).double().mean().item()
    assert made.policy.rule == rule and report.policy == made.policy
    assert report.dynamic.accuracy == pytest.approx(accuracy)
    assert report.dynamic.mean_macs == pytest.approx(found.macs.double().mean().item())
    assert accuracy >= report.static.accuracy - 0.3 - 1e-9
    assert report.dynamic.mean_macs < 0.98 * made.static_macs
    save(made, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert isinstance(loaded, DynamicModel) and loaded.policy == made.policy and loaded.table == made.table


@pytest.mark.parametrize("risk_of", ["disagreement", "accuracy-loss"])
def test_a_promised_risk(risk_of: Any) -> None:
    made, data = easy()
    report = choose_policy(made, data, risk=0.1, confidence=0.8, risk_of=risk_of)
    promise = report.risk
    assert promise is not None and promise.loss == risk_of and promise.samples == 300 and promise.step > 0
    assert promise.observed < 0.1 and promise.p_value <= 0.2
    final, found = made.all_logits(data.tensors[0])[-1].argmax(-1), made.predict(data.tensors[0]).logits.argmax(-1)
    assert 0 < (final != found).double().mean() < 0.13
    with pytest.raises(RequestError, match=r"300 samples cannot promise a risk of 0\.001 with confidence 0\.8"):
        choose_policy(made, data, risk=0.001, confidence=0.8, risk_of=risk_of)


def test_exits_that_are_wrong_cannot_promise_anything() -> None:
    made = DynamicModel(deep_copy(graph_with_exits("resnet"))).eval()
    x = CASES["resnet"].batch(300)
    answers = made.all_logits(x)[-1].argmax(-1).tolist()
    never = next(c for c in range(10) if answers.count(c) < 30)
    for head in made.trunk.exits.children():
        head.linear.bias.data[never] += 100
    with pytest.warns(UserWarning, match="no exit keeps the risk of 0.05 with confidence 0.9 on 150 samples"):
        choose_policy(made, TensorDataset(x, made.all_logits(x)[-1].argmax(-1)), risk=0.05)
    assert made.predict(x).exit_index.tolist() == [3] * 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "patience", "threshold_search": "grid"}, "the grid cannot enumerate rule 'patience'"),
        ({"threshold_search": "random"}, "unknown threshold_search 'random': give grid, genetic, quota, uniform"),
        ({"risk": 0.1, "macs": 0.5}, "give one of them"),
        ({"risk": 2.0}, "must lie between 0 and 1"),
        ({"risk_of": "luck"}, "unknown risk_of 'luck'"),
    ],
)
def test_wrong_goals(options: dict[str, Any], message: str) -> None:
    made = DynamicModel(graph_with_exits("resnet")).eval()
    with pytest.raises(RequestError, match=message):
        choose_policy(made, TensorDataset(torch.zeros(1, 3, 16, 16), torch.zeros(1)), **options)


# --- budgets -----------------------------------------------------------------------------------------------------


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


# --- deadlines ---------------------------------------------------------------------------------------------------


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


def test_policies_keep_their_table() -> None:
    made = DynamicModel(graph_with_exits("resnet"), table=[OperatingPolicy(1, 0.5, ExitPolicy.never(3))]).eval()
    assert made.with_policy(replace(ExitPolicy.never(3), rule="energy")).table == made.table


def test_files_of_before_there_were_tables_load(tmp_path: Path) -> None:
    made = DynamicModel(graph_with_exits("vit"), ExitPolicy("entropy", (0.5, None, 0.9))).eval()
    table, tensors = encode_tensors(made.trunk)
    document = describe(made, table, None)
    del document["table"]
    write_file(tmp_path / "old.safetensors", document, tensors)
    loaded = load(tmp_path / "old.safetensors")
    assert isinstance(loaded, DynamicModel) and loaded.policy == made.policy and loaded.table == ()
