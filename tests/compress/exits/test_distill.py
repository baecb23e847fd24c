"""Self-distillation against a per-sample Python loop over the formula, and its gradients."""

import math

import pytest
import torch
from torch import Tensor

from dyncompress.compress.exits.self_distillation import SelfDistillation
from dyncompress.errors import RequestError

EXITS, BATCH, CLASSES = 4, 6, 5


def softmax(row: list[float], temperature: float) -> list[float]:
    weights = [math.exp(v / temperature) for v in row]
    return [w / sum(weights) for w in weights]


def cross_entropy(target: list[float], row: list[float], temperature: float) -> float:
    return -sum(t * math.log(p) for t, p in zip(target, softmax(row, temperature), strict=True))


def loop(logits: list[Tensor], labels: Tensor, c: float, t: float, teacher: str) -> float:
    """The formula, one sample and one exit at a time, with plain floats."""
    rows = [z.tolist() for z in logits]
    total = 0.0
    for i, label in enumerate(labels.tolist()):
        for k in range(EXITS):
            if label >= 0:
                total += (1 - c) * -math.log(softmax(rows[k][i], 1.0)[label])
            if k == EXITS - 1:
                continue
            teachers = [EXITS - 1] if teacher == "last" else list(range(k + 1, EXITS))
            for j in teachers:
                ce = cross_entropy(softmax(rows[j][i], t), rows[k][i], t)
                total += c * t * t * ce / len(teachers)
    return total / len(labels)


def draw(seed: int = 0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(BATCH, CLASSES, generator=generator, dtype=torch.float64) for _ in range(EXITS)]
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    labels[1] = labels[4] = -1
    return logits, labels


@pytest.mark.parametrize("teacher", ["last", "all"])
@pytest.mark.parametrize(("c", "t"), [(0.5, 1.0), (0.5, 1.7), (0.0, 2.0), (1.0, 3.0)])
def test_equals_the_formula(teacher: str, c: float, t: float) -> None:
    logits, labels = draw()
    loss = SelfDistillation(c, teacher)  # type: ignore[arg-type]
    loss.temperature = t
    assert loss(logits, labels).item() == pytest.approx(loop(logits, labels, c, t, teacher), rel=1e-12)


@pytest.mark.parametrize("teacher", ["last", "all"])
def test_gradients_are_those_of_the_formula_with_fixed_teachers(teacher: str) -> None:
    logits, labels = draw(1)
    leaves = [z.clone().requires_grad_() for z in logits]
    loss = SelfDistillation(0.3, teacher)  # type: ignore[arg-type]
    loss.temperature = t = 1.4
    loss(leaves, labels).backward()
    one_hot = torch.zeros(BATCH, CLASSES, dtype=torch.float64)
    one_hot[labels >= 0] = torch.eye(CLASSES, dtype=torch.float64)[labels[labels >= 0]]
    for k, leaf in enumerate(leaves):
        # d CE(y, softmax z) / dz = softmax z - y;  d T^2 CE(q, softmax(z/T)) / dz = T (softmax(z/T) - q)
        expected = 0.7 * (logits[k].softmax(-1) - one_hot) * (labels >= 0).unsqueeze(1)
        teachers = logits[k + 1 :] if teacher == "all" else logits[max(k + 1, EXITS - 1) :]
        for z in teachers:
            expected += 0.3 * t * ((logits[k] / t).softmax(-1) - (z / t).softmax(-1)) / len(teachers)
        torch.testing.assert_close(leaf.grad, expected / BATCH, rtol=1e-12, atol=1e-15)


def test_the_teacher_learns_only_from_labels() -> None:
    logits, labels = draw()
    leaves = [z.clone().requires_grad_() for z in logits]
    SelfDistillation()(leaves, torch.full_like(labels, -1)).backward()
    assert leaves[-1].grad is not None and leaves[-1].grad.abs().max() == 0
    assert leaves[0].grad is not None and leaves[0].grad.abs().max() > 0


def test_temperature_grows_only_while_the_teacher_is_confident() -> None:
    loss = SelfDistillation()
    teacher = torch.tensor([[3.0, 0.0, 0.0]]).repeat(4, 1)
    expected = 1.0
    for step in range(40):
        loss([teacher, teacher], torch.zeros(4, dtype=torch.long))
        loss.after_step(step)
        if softmax([3.0, 0.0, 0.0], expected)[0] > 0.5:
            expected *= 1.05
        assert loss.temperature == pytest.approx(expected)
    assert expected < 1.05**40  # the schedule stopped by itself
    assert softmax([3.0, 0.0, 0.0], expected)[0] <= 0.5


def test_state_survives_saving() -> None:
    logits, labels = draw()
    loss = SelfDistillation()
    for step in range(3):
        loss([5 * z for z in logits], labels)
        loss.after_step(step)
    resumed = SelfDistillation()
    resumed.load_state_dict(loss.state_dict())
    assert resumed.temperature == loss.temperature > 1
    assert torch.equal(resumed(logits, labels), loss(logits, labels))


@pytest.mark.parametrize("arguments", [{"weight": 1.5}, {"weight": -0.1}, {"teacher": "first"}])
def test_wrong_arguments(arguments: dict) -> None:
    with pytest.raises(RequestError):
        SelfDistillation(**arguments)
