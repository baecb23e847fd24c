"""Temperature scaling against a grid search and the true temperature; ECE against torchmetrics."""

import math
import sys
import types

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from dyncompress.compress.thresholds.calibrate import (
    calibrate_exits,
    expected_calibration_error,
    expected_ece_floor,
    fit_temperature,
    reliability,
)
from dyncompress.errors import RequestError

# torchmetrics imports torchvision where it is installed, whose operators may not load beside a CPU-only torch.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

from torchmetrics.classification import MulticlassCalibrationError  # noqa: E402


def draw(count: int = 4000, classes: int = 7, true: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits z with labels drawn from softmax(z / true): `true` is the temperature to find."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, classes, generator=generator)
    labels = torch.multinomial((logits / true).softmax(-1), 1, generator=generator).squeeze(1)
    return logits, labels


@pytest.mark.parametrize("true", [0.4, 1.0, 2.5])
def test_temperature_is_the_minimum_and_near_the_truth(true: float) -> None:
    logits, labels = draw(true=true)
    found = fit_temperature(logits, labels)
    reference = minimize_scalar(
        lambda t: float(F.cross_entropy(logits.double() / math.exp(t), labels)), bounds=(-3, 3), method="bounded"
    )
    assert found == pytest.approx(math.exp(reference.x), rel=1e-4)
    assert found == pytest.approx(true, rel=0.1)


def test_temperature_of_a_perfect_exit_stays_finite() -> None:
    labels = torch.arange(10)
    perfect = 5 * torch.eye(10)
    assert math.exp(-3.01) < fit_temperature(perfect, labels) < 1
    assert 1 < fit_temperature(-perfect, labels) < math.exp(3.01)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_ece_equals_torchmetrics(bins: int) -> None:
    logits, labels = draw(true=2.0)
    metric = MulticlassCalibrationError(num_classes=7, n_bins=bins, norm="l1")
    expected = metric(logits.softmax(-1), labels).item()
    assert expected_calibration_error(logits, labels, bins) == pytest.approx(expected, abs=1e-6)


def test_each_exit_gets_its_own_temperature() -> None:
    (a, labels), scale = draw(), 2.0
    first, second = calibrate_exits([a, scale * a], labels)
    assert second.temperature == pytest.approx(scale * first.temperature, rel=1e-4)
    assert second.ece_before == pytest.approx(expected_calibration_error(scale * a, labels))
    assert second.ece_after == pytest.approx(first.ece_after, abs=1e-4)
    assert second.ece_after < second.ece_before


def test_no_samples() -> None:
    with pytest.raises(RequestError):
        fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(RequestError):
        expected_calibration_error(torch.zeros(4, 3), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("count", [200, 2000])
def test_the_noise_floor_is_the_ece_of_honest_exits(count: int) -> None:
    logits, _ = draw(count)
    generator = torch.Generator().manual_seed(1)
    labels = torch.multinomial(logits.softmax(-1), 300, replacement=True, generator=generator)
    honest = [expected_calibration_error(logits, labels[:, i]) for i in range(300)]
    assert expected_ece_floor(logits) == pytest.approx(sum(honest) / 300, rel=0.05)


def test_reliability_by_hand() -> None:
    p = torch.tensor([[0.55, 0.45], [0.45, 0.55], [0.58, 0.42], [0.95, 0.05]], dtype=torch.float64)
    low, high = reliability(p.log(), torch.tensor([0, 0, 0, 0]), bins=10)
    assert (low.samples, high.samples) == (3, 1)
    assert (low.confidence, low.accuracy) == pytest.approx((0.56, 2 / 3))
    assert (high.confidence, high.accuracy) == pytest.approx((0.95, 1.0))
