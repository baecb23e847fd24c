"""Samples that no exit is sure of are answered by the ensemble: everywhere the same as worked out sample by sample."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, call
from dynamic_models import leaning
from flat_options import flat
from nets import TwoInputs
from onnx_files import run
from played import WEIGHTS
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dyncompress as dc
from dyncompress.compress.thresholds.candidates import Cached, Candidates, by_quota, collect_cached
from dyncompress.compress.thresholds.choose_policy import choose_policy
from dyncompress.compress.thresholds.risk import losses
from dyncompress.errors import RequestError
from dyncompress.runtime.onnx.export import export_onnx
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import ExitPolicy

SURE = {"fallback": "ensemble", "final_temperature": 0.7}
POLICIES = {
    "max-softmax": ExitPolicy("max-softmax", (0.49, 0.3, 0.23), (1.0, 1.5, 2.0), **SURE),
    "one exit off": ExitPolicy("entropy", (0.55, None, 0.95), (1.0, 1.5, 2.0), **SURE),
    "patience": ExitPolicy("patience", (1, 2, 2), (1.0, 1.5, 2.0), **SURE),
    "learned": ExitPolicy("learned", (0.43, 0.35, 0.27), (1.0, 1.5, 2.0), WEIGHTS, **SURE),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def softmax(z: list[float], temperature: float) -> list[float]:
    weights = [math.exp(v / temperature) for v in z]
    return [w / sum(weights) for w in weights]


def mean_of(policy: ExitPolicy, logits: list[list[float]], last: int | None = None) -> list[float]:
    """The mean probabilities of one sample: of the exits that are on up to `last`, None: and of the final one."""
    temperatures = (*policy.temperatures, policy.final_temperature)
    on = [k for k in range(len(logits) - 1) if policy.is_on(k) and (last is None or k <= last)]
    counted = [softmax(logits[k], temperatures[k]) for k in ([*on, len(logits) - 1] if last is None else on)]
    return [sum(p) / len(counted) for p in zip(*counted, strict=True)]


def wanted(policy: ExitPolicy, logits: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Exits, as without a fallback, and their logits; at the end the logarithms of the ensemble's probabilities."""
    at = ExitPolicy(policy.rule, policy.thresholds, policy.temperatures, policy.weights).exit_of(logits)
    rows = []
    for n, k in enumerate(at.tolist()):
        whole = [z[n].tolist() for z in logits]
        rows.append([math.log(p) for p in mean_of(policy, whole)] if k == len(logits) - 1 else whole[k])
    return at, torch.tensor(rows)


@pytest.mark.parametrize("name", list(POLICIES))
def test_predictions_streams_and_files(name: str, tmp_path: Path) -> None:
    policy = POLICIES[name]
    model, batch = leaning("resnet", policy), CASES["resnet"].batch(60)
    at, logits = wanted(policy, model.all_logits(batch))
    assert 0 < int((at == 3).sum()) < 60
    out = model.predict(batch)
    assert torch.equal(out.exit_index, at)
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-5)
    streamed = list(model.predict_stream(batch.split([7, 30, 1, 22]), max_batch=16))
    assert torch.equal(torch.cat([p.exit_index for p in streamed]), at)
    torch.testing.assert_close(torch.cat([p.logits for p in streamed]), logits, rtol=1e-4, atol=1e-5)
    unsure = policy.answers(model.all_logits(batch))
    assert torch.equal(unsure[0], at) and torch.equal(unsure[1], logits.argmax(-1))
    dc.save(model, tmp_path / "a.dyn")
    again = dc.load(tmp_path / "a.dyn")
    assert isinstance(again, DynamicModel) and again.policy == policy
    assert ExitPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


@pytest.mark.parametrize(("name", "tunable"), [("max-softmax", True), ("patience", False)])
def test_onnx(name: str, tunable: bool, tmp_path: Path) -> None:
    policy = POLICIES[name]
    model, batch = leaning("two-inputs", policy_for_two(policy)), CASES["two-inputs"].batch(80)
    export_onnx(model, tmp_path / "a.onnx", tunable=tunable)
    got = run(tmp_path / "a.onnx", batch)
    at, logits = wanted(model.policy, call(model.all_logits, batch))
    assert 0 < int((at == 2).sum()) < 80
    assert got["exit_index"].tolist() == at.tolist()
    np.testing.assert_allclose(got["logits"], logits.numpy(), rtol=1e-3, atol=1e-5)
    if tunable:
        logits = wanted(
            ExitPolicy("max-softmax", (1.0, 1.0), model.policy.temperatures, **SURE), call(model.all_logits, batch)
        )[1]
        nobody = run(tmp_path / "a.onnx", batch, threshold_0=1, threshold_1=1)
        np.testing.assert_allclose(nobody["logits"], logits.numpy(), rtol=1e-3, atol=1e-5)


def policy_for_two(policy: ExitPolicy) -> ExitPolicy:
    """The same for a model of two exits and three classes."""
    thresholds = {"max-softmax": (0.9, 0.7), "patience": (1, 1)}
    return ExitPolicy(policy.rule, thresholds[policy.rule], (1.0, 1.5), policy.weights[:2], **SURE)


def test_who_is_cut_off_by_a_deadline_gets_the_ensemble_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ExitPolicy("max-softmax", (1.0, 1.0), (1.0, 2.0), **SURE)
    model, batch = leaning("two-inputs", policy), CASES["two-inputs"].batch(9)
    logits = call(model.all_logits, batch)
    out = model.predict(*batch, deadline_ms=1e6)
    torch.testing.assert_close(out.logits, wanted(policy, logits)[1], rtol=1e-4, atol=1e-5)
    allowed = iter([True, False])
    monkeypatch.setattr("dyncompress.runtime.predict.deadline.Deadline.allows", lambda *_: next(allowed))
    out = model.predict(*batch, deadline_ms=1e6)
    assert out.exit_index.tolist() == [1] * 9
    for n in range(9):
        mean = mean_of(policy, [z[n].tolist() for z in logits], last=1)
        torch.testing.assert_close(out.logits[n].softmax(-1), torch.tensor(mean), rtol=1e-4, atol=1e-5)


# --- choosing ----------------------------------------------------------------------------------------------------


def cached(count: int = 400) -> Cached:
    """Exits that are right a little more often than not, and a final one that is right no more often than they."""
    labels = torch.randint(0, 5, (count,))
    logits = [s * F.one_hot(labels, 5) + torch.randn(count, 5) for s in (1.5, 1.8, 2.0)]
    return Cached(logits, labels, [1.0, 1.0, 1.0], [0.1, 0.1])


def by_hand(policy: ExitPolicy, data: Cached) -> list[bool]:
    logits = wanted(policy, tuple(data.logits))[1]
    return [int(np.argmax(z)) == y for z, y in zip(logits.tolist(), data.labels.tolist(), strict=True)]


@pytest.mark.parametrize("thresholds", [(0.9, 0.9), (None, 0.8), (None, None)])
def test_what_a_policy_does_on_cached_logits(thresholds: tuple[float | None, ...]) -> None:
    data, policy = cached(), ExitPolicy("max-softmax", thresholds, (0.8, 1.2), **SURE)
    right = by_hand(policy, data)
    assert data.play(policy).accuracy == pytest.approx(sum(right) / 400)
    full = (data.logits[-1].argmax(-1) == data.labels).tolist()
    assert losses(policy, data.logits, data.labels).tolist() == [f - r for f, r in zip(full, right, strict=True)]
    if thresholds[1] is not None:
        assert sum(right) > sum(by_hand(ExitPolicy("max-softmax", thresholds, (0.8, 1.2)), data))


def test_candidates_know_the_ensemble() -> None:
    data, template = cached(), ExitPolicy("max-softmax", (0.5, 0.5), (0.8, 1.2), **SURE)
    policies = by_quota(template, data)
    search = Candidates(policies, data)
    for policy in policies[::8]:
        assert policy.fallback == "ensemble" and policy.final_temperature == 0.7
        assert search.right_with(policy.thresholds).tolist() == by_hand(policy, data)


def test_the_chosen_policy_does_what_is_reported() -> None:
    model = leaning("two-inputs", ExitPolicy.never(2))
    x, late = CASES["two-inputs"].batch(200)
    labels = call(model.all_logits, (x, late))[1].argmax(-1)
    data = TensorDataset(x, late, labels)
    pairs = [((a, b), int(y)) for a, b, y in data]
    report = choose_policy(model, pairs, macs=0.9, leaving=dc.Leaving(threshold_search="quota", fallback="ensemble"))  # type: ignore[arg-type]
    assert model.policy.fallback == "ensemble" == report.policy.fallback
    assert model.policy.final_temperature == pytest.approx(report.exits[-1].temperature)
    out = model.predict(x, late)
    assert report.dynamic.accuracy == pytest.approx(float((out.logits.argmax(-1) == labels).double().mean()))
    assert all(row.policy.fallback == "ensemble" for row in model.table)
    assert collect_cached(model, pairs).play(model.policy).accuracy == report.dynamic.accuracy  # type: ignore[arg-type]


def test_refused() -> None:
    options: dict[str, Any] = {"exits": 2, "data": [((torch.zeros(12), torch.zeros(())), 0)] * 20}
    with pytest.raises(RequestError, match="unknown fallback 'mean'; give final or ensemble"):
        flat(dc.convert)(TwoInputs(), **options, fallback="mean")
    with pytest.raises(RequestError, match="the grid cannot enumerate fallback 'ensemble'"):
        flat(dc.convert)(TwoInputs(), **options, fallback="ensemble", threshold_search="grid")
    with pytest.raises(RequestError, match=r"temperature 0\.0 of exit 1 is not a positive number"):
        ExitPolicy("max-softmax", (0.5,), fallback="ensemble", final_temperature=0.0)
