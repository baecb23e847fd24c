"""Calibration: one temperature per exit, so that a confidence of 0.9 means right nine times in ten.

Temperature scaling (Guo et al., ICML 2017): minimise the negative log-likelihood of softmax(z / T) on held-out data
over log T. It never changes the predicted class. The expected calibration error is

    ECE = sum_b n_b / n |accuracy_b - confidence_b|      over bins b of the largest softmax value.

Even honest confidences c_i have an ECE on finitely many samples, since sums of chance events stray from their means.
That noise floor is, with normal sums,

    E ECE = 1/n sum_b sqrt(2/pi sum_{i in b} c_i (1 - c_i)).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import RequestError

# On data that an exit separates perfectly the likelihood has no maximum: T would go to 0.
_LOG_RANGE = 3.0


@dataclass(frozen=True)
class Bin:
    """The samples whose confidence lies in one bin: how many, their mean confidence and their accuracy, both 0..1."""

    samples: int
    confidence: float
    accuracy: float


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
    return _ece(reliability(logits, labels, bins))


def _ece(rows: Sequence[Bin]) -> float:
    return sum(row.samples * abs(row.accuracy - row.confidence) for row in rows) / sum(row.samples for row in rows)


def expected_ece_floor(logits: Tensor, bins: int = 15) -> float:
    """The ECE (0..1) to expect of N samples with the confidences of these (N, classes) logits, were all honest."""
    confidence = logits.double().softmax(-1).amax(-1)
    variance = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    variance.index_add_(0, _bins(confidence, bins), confidence * (1 - confidence))
    return float((2 / math.pi * variance).sqrt().sum() / len(confidence))


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> list[Bin]:
    """The bins of a reliability diagram of (N, classes) logits that hold samples, by rising confidence.

    Raises:
        RequestError: no samples.
    """
    _check(logits, labels)
    confidence, predicted = logits.double().softmax(-1).max(-1)
    index = _bins(confidence, bins)
    sums = torch.zeros(3, bins, dtype=torch.float64, device=logits.device)
    sums.index_add_(1, index, torch.stack([torch.ones_like(confidence), confidence, (predicted == labels).double()]))
    return [Bin(int(n), c / n, right / n) for n, c, right in sums.T.tolist() if n]


def _bins(confidence: Tensor, bins: int) -> Tensor:
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    return torch.bucketize(confidence, edges[1:-1])


def _check(logits: Tensor, labels: Tensor) -> None:
    if len(labels) == 0 or len(logits) != len(labels):
        raise RequestError(
            f"calibration needs one label per sample, got {len(logits)} samples and {len(labels)} labels"
        )


@dataclass(frozen=True)
class Calibration:
    """What temperature scaling did to one exit: its temperature, and the ECE (0..1) before and after.

    ece_floor: the ECE that is due to chance alone. before, after: the bins of the reliability diagrams.
    """

    temperature: float
    ece_before: float
    ece_after: float
    ece_floor: float
    before: tuple[Bin, ...]
    after: tuple[Bin, ...]


def calibrate_exits(logits: Sequence[Tensor], labels: Tensor) -> tuple[Calibration, ...]:
    """One temperature per exit, from logits (N, classes) each and labels (N,) of the calibration set.

    Raises:
        RequestError: no samples.
    """
    done = []
    for z in logits:
        temperature = fit_temperature(z, labels)
        before, after = reliability(z, labels), reliability(z / temperature, labels)
        floor = expected_ece_floor(z / temperature)
        done.append(Calibration(temperature, _ece(before), _ece(after), floor, tuple(before), tuple(after)))
    return tuple(done)
