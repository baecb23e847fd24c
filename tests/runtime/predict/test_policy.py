"""Every exit rule against plain loops over single samples; what a rule remembers in a compacted batch and in ONNX."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, call, graph_with_exits
from dynamic_models import leaning
from played import WEIGHTS, exits_by_hand

from dyncompress.errors import RequestError
from dyncompress.runtime.onnx.export import export_onnx
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import RULES, ExitPolicy


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


POLICIES = {
    "max-softmax": ExitPolicy("max-softmax", (0.49, 0.265, 0.185), (1.0, 1.5, 2.0)),
    "entropy": ExitPolicy("entropy", (0.55, 0.905, None), (1.0, 1.5, 2.0)),
    "margin": ExitPolicy("margin", (0.2, 0.1, 0.03), (1.0, 1.5, 2.0)),
    "energy": ExitPolicy("energy", (0.82, 0.75, 0.7), (1.0, 1.5, 2.0)),
    "patience": ExitPolicy("patience", (1, 1, 2)),
    "patience, one exit off": ExitPolicy("patience", (1, None, 1)),
    "learned": ExitPolicy("learned", (0.43, 0.3, 0.252), (1.0, 1.5, 2.0), WEIGHTS),
}


@pytest.mark.parametrize("name", POLICIES)
def test_predict_is_a_plain_loop(name: str) -> None:
    made = leaning("resnet", POLICIES[name])
    x = CASES["resnet"].batch(60)
    logits = made.all_logits(x)
    wanted = exits_by_hand(made.policy, logits)
    found = made.predict(x)
    assert found.exit_index.tolist() == wanted and len(set(wanted)) >= 2
    assert made.policy.exit_of(made.all_logits(x)).tolist() == wanted
    answers = np.array([logits[k][i].numpy() for i, k in enumerate(wanted)])
    np.testing.assert_allclose(found.logits.numpy(), answers, rtol=1e-4, atol=1e-5)
    alone = [int(made.predict(x[i : i + 1]).exit_index) for i in range(0, 60, 9)]
    assert alone == wanted[::9]


@pytest.mark.parametrize(
    ("rule", "thresholds", "weights"),
    [
        ("margin", (0.5, 0.35), ()),
        ("energy", (0.82, 0.76), ()),
        ("learned", (0.55, 0.5), WEIGHTS[:2]),
    ],
)
def test_onnx_leaves_where_predict_does(rule: str, thresholds: Any, weights: Any, tmp_path: Path) -> None:
    made = leaning("two-inputs", ExitPolicy(rule, thresholds, (1.0, 1.5), weights))
    report = export_onnx(made, tmp_path / "model.onnx", inputs=CASES["two-inputs"].batch(64))  # raises where it differs
    assert sum(report.exits) == sum(report.max_error) and all(report.exits)


def test_patience_waits_at_the_first_exit() -> None:
    z = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    policy = ExitPolicy("patience", (1, 1, 2))
    first, state = policy.decide(0, z)
    second, state = policy.decide(1, z.flip(0)[[0, 0]], state)  # both say class 1: only the second sample agrees
    third, _ = policy.decide(2, z[[1, 1]], state)
    assert [t.tolist() for t in (first, second, third)] == [[False, False], [False, True], [False, True]]


def test_energy_by_hand() -> None:
    z = torch.tensor([[0.0, 0.0], [math.log(3.0), math.log(5.0)], [-40.0, -40.0], [400.0, 0.0]])
    e = [0.0, math.log(8) - math.log(2), -40.0, 400 - math.log(2)]
    found, _ = ExitPolicy("energy", (0.5,)).score(0, z)
    np.testing.assert_allclose(found, [0.5 + v / (2 + 2 * abs(v)) for v in e], rtol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_round_trip(name: str) -> None:
    policy = POLICIES[name]
    assert ExitPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_what_there_was_before_reads_as_ever() -> None:
    old = {"rule": "entropy", "thresholds": [0.5, None], "temperatures": [1.0, 2.0]}
    assert ExitPolicy.from_dict(old) == ExitPolicy("entropy", (0.5, None), (1.0, 2.0))
    assert ExitPolicy.from_dict(old).to_dict() == old


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("guess", (0.5,)), "unknown exit rule 'guess'; the rules are: max-softmax, entropy"),
        (("entropy", (1.5,)), r"threshold 1.5 of exit 0 is not in \[0, 1\]; None switches it off"),
        (("entropy", (0.1, math.nan)), "threshold nan of exit 1"),
        (("entropy", (0.5,), (1.0, 2.0)), "1 thresholds but 2 temperatures"),
        (("entropy", (0.5,), (0.0,)), "temperature 0.0 of exit 0 is not a positive number"),
        (("patience", (0.5,)), r"threshold 0.5 of exit 0 is not in \[1, inf\]"),
        (("margin", (1.5,)), r"threshold 1.5 of exit 0 is not in \[0, 1\]"),
        (("learned", (0.5,)), "'learned' with 1 exits takes 1 rows of 5 weights, got 0"),
        (("learned", (0.5,), (1.0,), ((1.0, 2.0),)), r"takes 1 rows of 5 weights, got 1 of \[2\]"),
        (("entropy", (0.5,), (1.0,), ((1.0,) * 5,)), "'entropy' with 1 exits takes 0 rows"),
        (("learned", (0.5,), (1.0,), ((math.nan,) * 5,)), "not finite"),
    ],
)
def test_wrong_policies(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ExitPolicy(*arguments)


def test_every_rule_is_tested() -> None:
    assert {policy.rule for policy in POLICIES.values()} == set(RULES)
    assert call(leaning("vit", POLICIES["patience"]).predict, CASES["vit"].batch(3)).logits.shape == (3, 10)


def test_policy_round_trip() -> None:
    policy = ExitPolicy("entropy", (0.1, None, math.inf), (1.0, 2.0, 0.5))
    assert policy.thresholds == (0.1, None, None) and not policy.is_on(2)
    assert ExitPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert ExitPolicy("max-softmax", (0.5, 0.5)).temperatures == (1.0, 1.0)


def test_a_policy_for_another_model() -> None:
    with pytest.raises(RequestError, match="the policy has 1 thresholds, the model 3 early exits"):
        DynamicModel(graph_with_exits("resnet"), ExitPolicy("entropy", (0.5,)))
    with pytest.raises(RequestError, match="the exit policy lacks temperatures"):
        ExitPolicy.from_dict({"rule": "entropy", "thresholds": []})


def test_rules_by_hand() -> None:
    z = torch.tensor([[math.log(2.0), 0.0, 0.0], [0.0, 0.0, 0.0], [50.0, 0.0, 0.0]])  # p: (.5 .25 .25), uniform, sure
    assert ExitPolicy("max-softmax", (0.49,)).decide(0, z)[0].tolist() == [True, False, True]
    assert ExitPolicy("max-softmax", (0.49,), (2.0,)).decide(0, z)[0].tolist() == [False, False, True]
    share = 1.5 * math.log(2) / math.log(3)
    assert ExitPolicy("entropy", (share + 1e-6,)).decide(0, z)[0].tolist() == [True, False, True]
    assert ExitPolicy("entropy", (share - 1e-6,)).decide(0, z)[0].tolist() == [False, False, True]
    assert not ExitPolicy("entropy", (None,)).decide(0, z)[0].any()
