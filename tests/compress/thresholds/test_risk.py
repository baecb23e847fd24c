"""Risk control against sums by hand, a plain loop over bets, and 2,000 simulated calibrations."""

import math
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from dyncompress.compress.thresholds.candidates import Cached
from dyncompress.compress.thresholds.risk import control_risk, last_passed, losses, p_values, risk_path, samples_needed
from dyncompress.compress.thresholds.thresholds import ThresholdSearch
from dyncompress.errors import RequestError
from dyncompress.runtime.predict.policy import ExitPolicy

CLASSES = 4
DRAWS, RISK, DELTA = 2000, 0.03, 0.1


def draw(samples: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Three exits, the first two worse than the last on some samples and better on a few."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    signal = torch.rand(samples, 1, generator=generator) * torch.eye(CLASSES)[labels]
    return [s * signal + torch.randn(samples, CLASSES, generator=generator) for s in (5.0, 8.0, 12.0)], labels


@cache
def path(agreement: bool) -> list[ExitPolicy]:
    """Made on samples of its own, as in use."""
    logits, labels = draw(1000, 1)
    search = ThresholdSearch(logits, logits[-1].argmax(-1) if agreement else labels, [20, 20, 60], [0, 0])
    by_macs = [ExitPolicy("max-softmax", point.thresholds) for point in search.curve(25)]
    return risk_path(by_macs, logits)


@cache
def population(agreement: bool) -> np.ndarray:
    """The losses of every policy of the path on 50,000 samples that stand for all there are: (P, 50,000)."""
    logits, labels = draw(50_000, 2)
    return np.stack([losses(one, logits, None if agreement else labels) for one in path(agreement)])


# --- p-values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("errors", "count", "risk"), [(0, 10, 0.1), (3, 50, 0.07), (5, 1000, 0.01)])
def test_the_binomial_p_value_is_its_sum(errors: int, count: int, risk: float) -> None:
    exact = Fraction(risk)
    wanted = sum(math.comb(count, j) * exact**j * (1 - exact) ** (count - j) for j in range(errors + 1))
    loss = np.zeros((1, count))
    loss[0, :errors] = 1
    assert p_values(loss, risk, 0.1, signed=False)[0] == pytest.approx(float(wanted), rel=1e-9)


def test_how_many_errors_a_promise_allows() -> None:
    """The figures of eps = 1 %, delta = 0.1: one error in 500 samples, 5 in 1,000, 40 in 5,000."""
    for count, most in ((500, 1), (1000, 5), (5000, 40)):
        loss = np.tril(np.ones((most + 2, count)), -1)  # row e has e errors
        passed = p_values(loss, 0.01, 0.1, signed=False) <= 0.1
        assert passed.tolist() == [True] * (most + 1) + [False]


def bet(losses_: list[float], risk: float, delta: float) -> float:
    """The largest product of bets, one sample at a time."""
    count, wealth, best, total, squares, variance = len(losses_), 1.0, 1.0, 0.0, 0.0, 0.25
    for i, x in enumerate(losses_, 1):
        stake = min(1.0, math.sqrt(2 * math.log(1 / delta) / (count * variance)))
        wealth *= 1 - stake * (x - risk)
        best = max(best, wealth)
        total += x
        mean = (0.5 + total) / (1 + i)
        squares += (x - mean) ** 2
        variance = (0.25 + squares) / (1 + i)
    return best


def test_the_betting_p_value_is_a_plain_loop() -> None:
    random = np.random.default_rng(0)
    loss = random.choice([-1.0, 0.0, 1.0], p=[0.03, 0.95, 0.02], size=(6, 400))
    wanted = [1 / bet(row.tolist(), 0.02, 0.1) for row in loss]
    np.testing.assert_allclose(p_values(loss, 0.02, 0.1, signed=True), wanted, rtol=1e-9)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize(("risk", "delta"), [(0.01, 0.1), (0.05, 0.01)])
def test_samples_needed(with_labels: bool, risk: float, delta: float) -> None:
    needed = samples_needed(risk, delta, with_labels=with_labels)

    def passes(count: int) -> bool:
        return 1 / bet([0.0] * count, risk, delta) <= delta if with_labels else (1 - risk) ** count <= delta

    assert passes(needed) and not passes(needed - 1)


# --- the walk ----------------------------------------------------------------------------------------------------


def test_the_walk_stops_at_the_first_failure() -> None:
    assert last_passed(np.array([0.01, 0.02, 0.3, 0.01]), 0.1) == 1  # a later success does not count
    assert last_passed(np.array([0.01, 0.02]), 0.1) == 1
    assert last_passed(np.array([0.2, 0.02]), 0.1) == -1


def test_losses_by_hand() -> None:
    logits, labels = draw(200, 3)
    policy = ExitPolicy("max-softmax", (0.7, 0.8))
    for labelled in (labels, None):
        found = losses(policy, logits, labelled)
        for i in range(200):
            at = next((k for k in range(2) if float(logits[k][i].softmax(-1).max()) >= (0.7, 0.8)[k]), 2)
            early, full = int(logits[at][i].argmax()), int(logits[2][i].argmax())
            if labelled is None:
                assert found[i] == (early != full)
            else:
                assert found[i] == int(early != labels[i]) - int(full != labels[i])


@pytest.mark.parametrize("agreement", [True, False])
def test_the_path_begins_with_nobody_and_grows_eager(agreement: bool) -> None:
    logits, labels = draw(5000, 4)
    cached = Cached(logits, labels, [20, 20, 60], [0, 0])
    macs = [cached.play(policy).mean_cost for policy in path(agreement)]
    assert path(agreement)[0].thresholds == (None, None) and macs[0] == 100
    assert macs[-1] < 40 and all(b <= a + 2 for a, b in pairwise(macs))


@pytest.mark.parametrize("agreement", [True, False])
def test_violations_of_simulated_calibrations(agreement: bool) -> None:
    loss = population(agreement)
    true_risk = loss.mean(1)
    assert true_risk[0] == 0 and true_risk.max() > 2 * RISK
    random, found = np.random.default_rng(0), []
    for _ in range(DRAWS):
        rows = random.integers(0, loss.shape[1], 600)
        found.append(last_passed(p_values(loss[:, rows], RISK, DELTA, signed=not agreement), DELTA))
    right = np.array(found)
    first_failing = np.minimum(right + 1, len(loss) - 1)
    violations, wrong = ((true_risk[steps] > RISK).mean() for steps in (right, first_failing))
    assert violations <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)
    assert wrong > violations + 3 * math.sqrt(violations * (1 - violations) / DRAWS)
    assert np.median(right) > 15  # it does let samples leave


@pytest.mark.parametrize("agreement", [True, False])
def test_control_risk_is_that_walk(agreement: bool) -> None:
    logits, labels = draw(2000, 5)
    policy, found = control_risk(logits, None if agreement else labels, path(agreement), risk=RISK, delta=DELTA)
    loss = np.stack([losses(one, logits, None if agreement else labels) for one in path(agreement)])
    assert policy == path(agreement)[found.step] and found.observed == pytest.approx(loss[found.step].mean())
    assert found.p_value <= DELTA and found.observed < RISK
    assert (found.samples, found.confidence, found.steps) == (2000, 0.9, len(loss))
    if agreement:  # the order of the samples does not matter
        assert found.step == last_passed(p_values(loss, RISK, DELTA, signed=False), DELTA)


def test_what_cannot_be_promised() -> None:
    logits, labels = draw(100, 6)
    with pytest.raises(
        RequestError, match=r"100 samples cannot promise a risk of 0.01 with confidence 0.9.* least 230"
    ):
        control_risk(logits, None, path(True), risk=0.01, delta=0.1)
    with pytest.raises(RequestError, match="must lie between 0 and 1"):
        control_risk(logits, None, path(True), risk=0.0, delta=0.1)
    with pytest.raises(RequestError, match="must be the one that never exits"):
        control_risk(logits, None, [ExitPolicy("max-softmax", (0.0, 0.0))], risk=0.05, delta=0.1)
    with pytest.raises(RequestError, match="one label per sample"):
        control_risk(logits, labels[:5], path(True), risk=0.05, delta=0.1)
