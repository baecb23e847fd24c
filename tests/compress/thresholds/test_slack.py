"""The slack on the calibration set against a plain cross-validation and against what unseen samples lose."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dyncompress.compress.thresholds.held_out_loss import held_out_slack
from dyncompress.compress.thresholds.thresholds import ThresholdSearch

STAGES, HEADS, CLASSES = [20, 20, 60], [0, 0], 4


def draw(samples: int, seed: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    ease = torch.rand(samples, 1, generator=generator)
    signal = ease * torch.eye(CLASSES)[labels]
    return [s * signal + torch.randn(samples, CLASSES, generator=generator) for s in (5, 7, 12)], labels


def static_right(logits: list[Tensor], labels: Tensor) -> Tensor:
    return logits[-1].argmax(-1) == labels


def test_equals_a_plain_cross_validation() -> None:
    (logits, labels), max_loss = draw(203, 0), 0.05
    right = static_right(logits, labels)
    random = np.random.default_rng(0)
    orders = [random.permutation(203) for _ in range(4)]
    allowed = [0.0]
    for slack in np.linspace(0, max_loss, 11):
        lost = np.zeros(203)
        for fold in (part for order in orders for part in np.array_split(order, 5)):
            rest = [i for i in range(203) if i not in set(fold.tolist())]
            search = ThresholdSearch([z[rest] for z in logits], labels[rest], STAGES, HEADS)
            thresholds = search.for_accuracy(min(right[rest].double().mean().item() - slack, search.best_accuracy))
            for i in fold.tolist():
                sure = [k for k, t in enumerate(thresholds.thresholds) if t and logits[k][i].softmax(-1).max() >= t]
                answer = logits[sure[0] if sure else 2][i].argmax()
                lost[i] += (float(right[i]) - float(answer == labels[i])) / 4
        if np.mean(lost) + np.std(lost) / np.sqrt(203) <= max_loss:
            allowed.append(slack)
    assert held_out_slack(ThresholdSearch(logits, labels, STAGES, HEADS), right, max_loss) == pytest.approx(allowed[-1])


def test_unseen_samples_keep_to_the_loss() -> None:
    unseen = draw(40_000, 99)
    judge = ThresholdSearch(*unseen, STAGES, HEADS)
    static, max_loss = static_right(*unseen).double().mean().item(), 0.03
    naive, safe = [], []
    for seed in range(6):
        logits, labels = draw(600, seed)
        search = ThresholdSearch(logits, labels, STAGES, HEADS)
        right = static_right(logits, labels)
        slack = held_out_slack(search, right, max_loss)
        for losses, allowed in ((naive, max_loss), (safe, slack)):
            thresholds = search.for_accuracy(right.double().mean().item() - allowed).thresholds
            losses.append(static - judge.right_with(thresholds).mean())
    assert np.mean(safe) < max_loss < np.mean(naive)
    assert sum(loss > max_loss for loss in safe) <= 1 < sum(loss > max_loss for loss in naive)


def test_a_tiny_calibration_set_gives_nothing_away() -> None:
    logits, labels = draw(4, 0)
    search = ThresholdSearch(logits, labels, STAGES, HEADS)
    assert held_out_slack(search, static_right(logits, labels), 0.5) == 0
