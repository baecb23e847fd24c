"""Answers of made-up exits, and plain loops that play policies and thresholds on them, one sample at a time."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dyncompress.runtime.predict.policy import ExitPolicy

STAGES, HEADS = [10, 15, 20, 55], [1, 3, 2]
CLASSES = 5
WEIGHTS = ((1.0, -1.0, 1.5, 0.0, -0.5), (0.5, -2.0, 1.0, 2.0, 0.0), (2.0, -0.5, 0.5, 1.0, -1.0))  # of a learned score

Data = tuple[list[Tensor], Tensor, list[int], list[int]]


def draw(samples: int, early: int, seed: int = 0) -> Data:
    """Exits that grow better with depth, on samples of different difficulty."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    ease = torch.rand(samples, 1, generator=generator)
    logits = []
    for k in range(early + 1):
        noise = torch.randn(samples, CLASSES, generator=generator)
        logits.append((1 + k) * 3 * ease * torch.eye(CLASSES)[labels] + noise)
    return logits, labels, STAGES[:early] + [STAGES[-1]], HEADS[:early]


def confidence(row: list[float], rule: str) -> float:
    weights = [math.exp(v) for v in row]
    p = [w / sum(weights) for w in weights]
    return max(p) if rule == "max-softmax" else -sum(v * math.log(v) for v in p) / math.log(len(p))


def leaves(value: float, threshold: float | None, rule: str) -> bool:
    if threshold is None:
        return False
    return value >= threshold if rule == "max-softmax" else value <= threshold


def simulate(data: Data, thresholds: tuple[float | None, ...], rule: str) -> tuple[float, float]:
    """Accuracy and mean MACs, one sample at a time."""
    logits, labels, stages, heads = data
    rows = [z.tolist() for z in logits]
    right = spent = 0
    for i, label in enumerate(labels.tolist()):
        for k, row in enumerate(rows):
            spent += stages[k]
            if k < len(heads) and thresholds[k] is not None:
                spent += heads[k]
            if k == len(heads) or leaves(confidence(row[i], rule), thresholds[k], rule):
                right += row[i].index(max(row[i])) == label
                break
    return right / len(labels), spent / len(labels)


def every_choice(logits: list[Tensor], rule: str, at_most: int | None = None) -> itertools.product:
    """All combinations of thresholds that tell samples apart (or `at_most` per exit)."""
    grids: list[list[float | None]] = []
    for z in logits[:-1]:
        values = sorted({confidence(row, rule) for row in z.tolist()})
        if at_most is not None:
            values = [values[i] for i in np.linspace(0, len(values) - 1, at_most).astype(int)]
        grids.append([None, *values])
    return itertools.product(*grids)


def score(policy: ExitPolicy, k: int, z: list[float], agreed: int = 0) -> float:
    """What exit k compares to its threshold, of one sample, whose last `agreed` pairs of exits agreed."""
    z = [v / policy.temperatures[k] for v in z]
    weights = [math.exp(v) for v in z]
    p = sorted((w / sum(weights) for w in weights), reverse=True)
    entropy = -sum(v * math.log(v) for v in p) / math.log(len(p))
    above = math.log(sum(weights)) - math.log(len(p))
    features = [p[0], entropy, p[0] - p[1], 1 - 1 / (1 + agreed)]
    raw = sum(w * f for w, f in zip(WEIGHTS[k], features, strict=False)) + WEIGHTS[k][-1]
    return {
        "max-softmax": p[0],
        "entropy": entropy,
        "margin": p[0] - p[1],
        "energy": (1 + above / (1 + abs(above))) / 2,
        "patience": agreed,
        "learned": 1 / (1 + math.exp(-raw)),
    }[policy.rule]


def exit_of(policy: ExitPolicy, logits: list[list[float]]) -> int:
    """The exit of one sample, from its logits at every exit."""
    answers: list[int] = []
    for k, z in enumerate(logits[:-1]):
        if (threshold := policy.thresholds[k]) is None:
            continue
        answers.append(int(np.argmax(z)))
        agreed = 0
        while agreed + 1 < len(answers) and answers[-agreed - 2] == answers[-1]:
            agreed += 1
        sure = score(policy, k, z, agreed)
        if sure <= threshold if policy.rule == "entropy" else sure >= threshold:
            return k
    return len(logits) - 1


def exits_by_hand(policy: ExitPolicy, logits: Sequence[Tensor]) -> list[int]:
    """The exits of a batch, from logits (B, classes) at every exit."""
    return [exit_of(policy, [z[i].tolist() for z in logits]) for i in range(len(logits[0]))]
