"""Shares, listed candidates and the genetic search against plain loops; what `choose_policy` makes of them."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, graph_with_exits
from dynamic_models import easy
from flat_options import flat
from played import draw, every_choice, simulate
from torch import Tensor
from torch.utils.data import TensorDataset

import dyncompress as dc
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
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import RULES, ExitPolicy, OperatingPolicy


def cached(samples: int = 200, early: int = 3, seed: int = 0) -> Cached:
    return Cached(*draw(samples, early, seed))


def template(rule: str, data: Cached) -> ExitPolicy:
    exits = len(data.head_costs)
    if rule == "learned":
        return fit_scorer(data.logits, data.labels, (1.0,) * exits)
    return ExitPolicy(rule, (RULES[rule].bounds[0],) * exits)


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
    report = choose_policy(made, data, max_loss=0.3, leaving=dc.Leaving(rule=rule, threshold_search=kind))
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
    report = choose_policy(made, data, leaving=dc.Leaving(risk=0.1, confidence=0.8, risk_of=risk_of))
    promise = report.risk
    assert promise is not None and promise.loss == risk_of and promise.samples == 300 and promise.step > 0
    assert promise.observed < 0.1 and promise.p_value <= 0.2
    final, found = made.all_logits(data.tensors[0])[-1].argmax(-1), made.predict(data.tensors[0]).logits.argmax(-1)
    assert 0 < (final != found).double().mean() < 0.13
    with pytest.raises(RequestError, match=r"300 samples cannot promise a risk of 0\.001 with confidence 0\.8"):
        choose_policy(made, data, leaving=dc.Leaving(risk=0.001, confidence=0.8, risk_of=risk_of))


def test_exits_that_are_wrong_cannot_promise_anything() -> None:
    """Wrong on nearly all, and as sure of one sample as of another, so that nobody leaves alone."""
    made = DynamicModel(deep_copy(graph_with_exits("resnet"))).eval()
    x = CASES["resnet"].batch(300)
    answers = made.all_logits(x)[-1].argmax(-1).tolist()
    never = next(c for c in range(10) if answers.count(c) < 30)
    for head in made.trunk.exits.children():
        head.linear.weight.data.zero_()
        head.linear.bias.data[never] += 100
    with pytest.warns(UserWarning, match="no exit keeps the risk of 0.05 with confidence 0.9 on 150 samples"):
        choose_policy(made, TensorDataset(x, made.all_logits(x)[-1].argmax(-1)), leaving=dc.Leaving(risk=0.05))
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
        flat(choose_policy)(made, TensorDataset(torch.zeros(1, 3, 16, 16), torch.zeros(1)), **options)


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
