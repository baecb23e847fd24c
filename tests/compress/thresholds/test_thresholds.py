"""Threshold search against brute force: plain loops over samples and every combination of thresholds."""

import math

import pytest
import torch
from played import CLASSES, STAGES, Data, draw, every_choice, simulate

from dyncompress.compress.thresholds.thresholds import OperatingPoint, ThresholdSearch
from dyncompress.errors import RequestError


def brute_force(data: Data, rule: str) -> list[tuple[float, float]]:
    return [simulate(data, t, rule) for t in every_choice(data[0], rule)]


def vectorised(data: Data, at_most: int) -> list[tuple[float, float]]:
    """The same as `brute_force` for max-softmax on a coarse grid, fast enough for many samples."""
    logits, labels, stages, heads = data
    conf = torch.stack([z.softmax(-1).amax(-1) for z in logits[:-1]])
    right = torch.stack([(z.argmax(-1) == labels).double() for z in logits])
    rows, found = torch.arange(len(labels)), []
    for choice in every_choice(logits, "max-softmax", at_most):
        t = torch.tensor([math.inf if v is None else v for v in choice]).unsqueeze(1)
        at = torch.cat([conf >= t, torch.ones(1, len(labels), dtype=torch.bool)]).int().argmax(0)
        paid = [s + h * (v is not None) for s, h, v in zip(stages, [*heads, 0], [*choice, None], strict=True)]
        cost = torch.tensor(paid, dtype=torch.float64).cumsum(0)
        found.append((right[at, rows].mean().item(), cost[at].mean().item()))
    return found


def check_self_consistent(point: OperatingPoint, data: Data, rule: str) -> None:
    accuracy, mean_macs = simulate(data, point.thresholds, rule)
    assert point.accuracy == pytest.approx(accuracy)
    assert point.mean_cost == pytest.approx(mean_macs)
    assert sum(point.shares) == pytest.approx(1)
    assert all((t is None) == (share == 0) for t, share in zip(point.thresholds, point.shares, strict=False))


@pytest.mark.parametrize("rule", ["max-softmax", "entropy"])
@pytest.mark.parametrize(("samples", "early"), [(60, 1), (17, 2), (9, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_exact_on_small_sets(samples: int, early: int, rule: str, seed: int) -> None:
    data = draw(samples, early, seed)
    search, found = ThresholdSearch(*data, rule=rule), brute_force(data, rule)
    static = (data[0][-1].argmax(-1) == data[1]).double().mean().item()
    for loss in (0.0, 0.1, 0.3):
        point = search.for_accuracy(static - loss)
        best = min((m, -a) for a, m in found if a >= static - loss - 1e-9)
        assert (point.mean_cost, -point.accuracy) == pytest.approx(best)
        check_self_consistent(point, data, rule)
    for share in (0.2, 0.5, 0.8):
        point = search.for_cost(share * sum(STAGES))
        best = min((-a, m) for a, m in found if m <= share * sum(STAGES) + 1e-9)
        assert (-point.accuracy, point.mean_cost) == pytest.approx(best)
        check_self_consistent(point, data, rule)


@pytest.mark.parametrize("seed", range(2))
def test_no_worse_than_a_coarse_grid_on_large_sets(seed: int) -> None:
    data = draw(1500, 3, seed)
    search, found = ThresholdSearch(*data), vectorised(data, at_most=13)
    static = (data[0][-1].argmax(-1) == data[1]).double().mean().item()
    for loss in (0.0, 0.01, 0.05):
        point = search.for_accuracy(static - loss)
        assert point.accuracy >= static - loss - 1e-9
        assert point.mean_cost <= min(m for a, m in found if a >= static - loss)
        check_self_consistent(point, data, "max-softmax")
    for share in (0.3, 0.6):
        point = search.for_cost(share * sum(STAGES))
        assert point.mean_cost <= share * sum(STAGES) + 1e-9
        assert point.accuracy >= max(a for a, m in found if m <= share * sum(STAGES))


def test_curve_is_the_front_of_all_choices() -> None:
    data = draw(9, 3, 1)
    found = brute_force(data, "max-softmax")
    curve = ThresholdSearch(*data).curve(points=7)
    costs = [p.mean_cost for p in curve]
    assert costs == sorted(costs) and len(set(costs)) == len(costs)
    for point in curve:
        check_self_consistent(point, data, "max-softmax")
        assert point.accuracy == pytest.approx(max(a for a, m in found if m <= point.mean_cost + 1e-9))
    assert curve[-1].accuracy == pytest.approx(max(a for a, _ in found))
    assert curve[0].mean_cost == pytest.approx(min(m for _, m in found))


def test_an_exit_that_only_guesses_is_off() -> None:
    logits, labels, stages, heads = draw(400, 2)
    logits[0] = 20 * torch.eye(CLASSES)[(labels + 1) % CLASSES]  # always sure, always wrong
    point = ThresholdSearch(logits, labels, stages, heads).for_accuracy(0.7)
    assert point.thresholds[0] is None and point.thresholds[1] is not None


def test_an_exit_whose_head_costs_more_than_it_saves_is_off() -> None:
    data = draw(400, 1)
    assert ThresholdSearch(*data).for_accuracy(0.7).thresholds[0] is not None
    point = ThresholdSearch(*data[:3], [60]).for_accuracy(0.7)
    assert point.thresholds == (None,) and point.mean_cost == data[2][0] + data[2][1]


def test_equal_scores_leave_together() -> None:
    labels = torch.tensor([0, 0, 0, 0])
    early = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 3.0]])  # three samples are equally sure
    final = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    point = ThresholdSearch([early, final], labels, [1, 9], [0]).for_accuracy(0.75)
    # the surest one is wrong, and the next three cannot be told apart: leaving alone costs 0.25, with them 0.5
    assert point.accuracy == 0.75 and point.mean_cost == pytest.approx((1 + 3 * 10) / 4)


def test_many_exits() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (300,), generator=generator)
    logits = [torch.eye(CLASSES)[labels] * k + torch.randn(300, CLASSES, generator=generator) for k in range(1, 14)]
    data = (logits, labels, [1] * 13, [0] * 12)
    point = ThresholdSearch(*data).for_accuracy(0.95)
    assert point.accuracy >= 0.95 and point.mean_cost < 13
    check_self_consistent(point, data, "max-softmax")


def test_what_cannot_be_done_is_refused() -> None:
    logits, labels, stages, heads = draw(50, 2)
    search = ThresholdSearch(logits, labels, stages, heads)
    with pytest.raises(RequestError, match="the best is"):
        search.for_accuracy(1.01)
    with pytest.raises(RequestError, match="the least is 11"):
        search.for_cost(9)
    with pytest.raises(RequestError, match="rule"):
        ThresholdSearch(logits, labels, stages, heads, rule="guess")
    with pytest.raises(RequestError, match="label"):
        ThresholdSearch(logits, labels[:10], stages, heads)
    with pytest.raises(RequestError, match="without a label"):
        ThresholdSearch(logits, torch.full_like(labels, -1), stages, heads)
    with pytest.raises(RequestError, match="got the costs of 2 stages and 2 heads"):
        ThresholdSearch(logits, labels, stages[:2], heads)
    with pytest.raises(RequestError, match="1 to 16"):
        ThresholdSearch(logits[:1], labels, stages[:1], [])
