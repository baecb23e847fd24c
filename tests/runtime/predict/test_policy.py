"""Every exit rule against plain loops over single samples; what a rule remembers in a compacted batch and in ONNX."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exit_models import CASES, call, graph_with_exits

from dyncompress.errors import RequestError
from dyncompress.passes.graph.copying import deep_copy
from dyncompress.runtime.onnx.export import export_onnx
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import RULES, ExitPolicy


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


LEAN = 2.0  # of the last class over the first, so that some exits agree
WEIGHTS = ((1.0, -1.0, 1.5, 0.0, -0.5), (0.5, -2.0, 1.0, 2.0, 0.0), (2.0, -0.5, 0.5, 1.0, -1.0))
POLICIES = {
    "max-softmax": ExitPolicy("max-softmax", (0.49, 0.265, 0.185), (1.0, 1.5, 2.0)),
    "entropy": ExitPolicy("entropy", (0.55, 0.905, None), (1.0, 1.5, 2.0)),
    "margin": ExitPolicy("margin", (0.2, 0.1, 0.03), (1.0, 1.5, 2.0)),
    "energy": ExitPolicy("energy", (0.82, 0.75, 0.7), (1.0, 1.5, 2.0)),
    "patience": ExitPolicy("patience", (1, 1, 2)),
    "patience, one exit off": ExitPolicy("patience", (1, None, 1)),
    "learned": ExitPolicy("learned", (0.43, 0.3, 0.252), (1.0, 1.5, 2.0), WEIGHTS),
}


def dynamic(name: str, policy: ExitPolicy) -> DynamicModel:
    """In evaluation mode; the logits of every exit have mean 0 and deviation 1 per class, and lean to the last one."""
    made = DynamicModel(deep_copy(graph_with_exits(name)), policy).eval()
    for head, z in zip(made.trunk.exits.children(), call(made.all_logits, CASES[name].batch(100)), strict=False):
        head.linear.weight.data /= z.std(0)[:, None]
        head.linear.bias.data = (head.linear.bias - z.mean(0)) / z.std(0) + torch.linspace(0, LEAN, z.shape[1])
    return made


def leaves(policy: ExitPolicy, k: int, z: list[float], agreed: int) -> bool:
    """Of one sample, whose last `agreed` pairs of exits agreed."""
    z = [v / policy.temperatures[k] for v in z]
    weights = [math.exp(v) for v in z]
    p = sorted((w / sum(weights) for w in weights), reverse=True)
    entropy = -sum(v * math.log(v) for v in p) / math.log(len(p))
    threshold = policy.thresholds[k]
    assert threshold is not None
    if policy.rule == "entropy":
        return entropy <= threshold
    above = math.log(sum(weights)) - math.log(len(p))
    features = [p[0], entropy, p[0] - p[1], 1 - 1 / (1 + agreed)]
    raw = sum(w * f for w, f in zip(WEIGHTS[k], features, strict=False)) + WEIGHTS[k][-1]
    score = {
        "max-softmax": p[0],
        "margin": p[0] - p[1],
        "energy": (1 + above / (1 + abs(above))) / 2,
        "patience": agreed,
        "learned": 1 / (1 + math.exp(-raw)),
    }[policy.rule]
    return score >= threshold


def by_hand(policy: ExitPolicy, logits: list[list[float]]) -> int:
    """The exit of one sample, from its logits at every exit."""
    answers: list[int] = []
    for k, z in enumerate(logits[:-1]):
        if policy.thresholds[k] is None:
            continue
        answers.append(int(np.argmax(z)))
        agreed = 0
        while agreed + 1 < len(answers) and answers[-agreed - 2] == answers[-1]:
            agreed += 1
        if leaves(policy, k, z, agreed):
            return k
    return len(logits) - 1


@pytest.mark.parametrize("name", POLICIES)
def test_predict_is_a_plain_loop(name: str) -> None:
    made = dynamic("resnet", POLICIES[name])
    x = CASES["resnet"].batch(60)
    logits = [z.double().tolist() for z in made.all_logits(x)]
    wanted = [by_hand(made.policy, [z[i] for z in logits]) for i in range(60)]
    found = made.predict(x)
    assert found.exit_index.tolist() == wanted and len(set(wanted)) >= 2
    assert made.policy.exit_of(made.all_logits(x)).tolist() == wanted
    answers = np.array([logits[k][i] for i, k in enumerate(wanted)])
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
    made = dynamic("two-inputs", ExitPolicy(rule, thresholds, (1.0, 1.5), weights))
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
    assert call(dynamic("vit", POLICIES["patience"]).predict, CASES["vit"].batch(3)).logits.shape == (3, 10)
