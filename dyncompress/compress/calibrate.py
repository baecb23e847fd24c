"""Calibration: one temperature per exit, so that a confidence of 0.9 means right nine times in ten.

Temperature scaling (Guo et al., ICML 2017): minimise the negative log-likelihood of softmax(z / T) on held-out data
over log T. It never changes the predicted class. The expected calibration error is

    ECE = sum_b n_b / n |accuracy_b - confidence_b|      over bins b of the largest softmax value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import RequestError

# On data that an exit separates perfectly the likelihood has no maximum: T would go to 0.
_LOG_RANGE = 3.0


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T > 0 that minimises NLL(z / T), within e^-3 .. e^3.

    Args:
        logits: (N, classes); labels: (N,) int64.

    Raises:
        RequestError: no samples.
    """
    _check(logits, labels)
    z, y = logits.detach().double().cpu(), labels.cpu()
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(z * torch.exp(-_bounded(log_t)), y)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return float(torch.exp(_bounded(log_t)).item())


def _bounded(log_t: Tensor) -> Tensor:
    """log T inside its range, smooth and of slope 1 at 0."""
    return _LOG_RANGE * torch.tanh(log_t / _LOG_RANGE)


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """ECE in 0..1 of (N, classes) logits over equally wide bins of the confidence.

    Raises:
        RequestError: no samples.
    """
    _check(logits, labels)
    confidence, predicted = logits.double().softmax(-1).max(-1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)
    index = torch.bucketize(confidence, edges[1:-1])
    gap = (predicted == labels).double() - confidence
    per_bin = torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(0, index, gap)
    return float(per_bin.abs().sum() / len(labels))


def _check(logits: Tensor, labels: Tensor) -> None:
    if len(labels) == 0 or len(logits) != len(labels):
        raise RequestError(
            f"calibration needs one label per sample, got {len(logits)} samples and {len(labels)} labels"
        )


@dataclass(frozen=True)
class Calibration:
    """What temperature scaling did to one exit: its temperature and the ECE (0..1) before and after."""

    temperature: float
    ece_before: float
    ece_after: float


def calibrate_exits(logits: Sequence[Tensor], labels: Tensor) -> tuple[Calibration, ...]:
    """One temperature per exit, from logits (N, classes) each and labels (N,) of the calibration set.

    Raises:
        RequestError: no samples.
    """
    done = []
    for z in logits:
        temperature = fit_temperature(z, labels)
        before = expected_calibration_error(z, labels)
        done.append(Calibration(temperature, before, expected_calibration_error(z / temperature, labels)))
    return tuple(done)
