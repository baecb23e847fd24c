"""A guarantee for early exits: risk <= eps with probability >= 1 - delta over the calibration set.

Learn then test (Angelopoulos et al. 2021) with fixed-sequence testing. Along a path of policies that was fixed on other
samples, from "nobody leaves early" towards leaving more and more, the hypothesis "the risk of this policy is > eps" is
tested on the calibration set; at the first one that is not rejected the walk stops, and the last rejected one is the
answer. To return the first failure instead, as some published code does, breaks the promise.

With x_i the loss of sample i out of n, the p-values are

    P(Bin(n, eps) <= sum_i x_i)                                x_i in {0, 1}: another answer than the full model's
    1 / max_i prod_{j<=i} (1 - nu_j (x_j - eps)), at most 1    x_i <= 1 with a sign: right answers lost

the latter by betting against the hypothesis (Waudby-Smith & Ramdas 2024), with the stakes

    nu_i = min(1, sqrt(2 ln(1/delta) / (n s2_{i-1})))
    mu_i = (1/2 + sum_{j<=i} x_j) / (1 + i),    s2_i = (1/4 + sum_{j<=i} (x_j - mu_j)^2) / (1 + i).
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import bdtr
from torch import Tensor

from ...errors import RequestError
from ...runtime.predict.policy import ExitPolicy
from .operating_points import Floats
from .quotas import shares_of, thresholds_for_shares

_TIGHT_STEPS = 20


@dataclass(frozen=True)
class Promise:
    """What a policy keeps on unseen samples.

    risk: eps, a rate 0..1. confidence: 1 - delta. samples: of the calibration set. loss: "disagreement" or
    "accuracy-loss". observed: the policy's mean loss on the calibration set. p_value: of its risk being > eps. step:
    how far along the path of `steps` policies it lies; 0 = nobody leaves early.
    """

    risk: float
    confidence: float
    samples: int
    loss: str
    observed: float
    p_value: float
    step: int
    steps: int


def control_risk(
    logits: Sequence[Tensor],
    labels: Tensor | None,
    path: Sequence[ExitPolicy],
    *,
    risk: float,
    delta: float,
    seed: int = 0,
) -> tuple[ExitPolicy, Promise]:
    """The last policy of a path whose risk is proven to be at most `risk`, with probability at least 1 - `delta`.

    Args:
        logits: (n, classes) of every exit, early first, the full model's last: samples drawn like those to come, that
            neither the path nor the temperatures have seen.
        labels: (n,) int64: the risk is the accuracy lost against the full model; None: it is the rate of other answers
            than the full model's, for which nobody has to know the truth.
        path: from the policy that never exits to the most eager one (`risk_path`), fixed without these samples.
        seed: of the order of the samples, which must not depend on their losses.

    Raises:
        RequestError: wrong rates, an empty path, labels of another number, or too few samples for any promise.
    """
    check_rates(risk, delta)
    count = len(logits[-1])
    if not path or (labels is not None and len(labels) != count):
        raise RequestError(f"risk control needs a path of policies ({len(path)}) and one label per sample ({count})")
    check_samples(count, risk, delta, with_labels=labels is not None)
    order = np.random.default_rng(seed).permutation(count)
    loss_PN = np.stack([losses(policy, logits, labels) for policy in path])[:, order]
    p_P = p_values(loss_PN, risk, delta, signed=labels is not None)
    step = last_passed(p_P, delta)
    if step < 0:
        raise RequestError("the first policy of the path fails already: it must be the one that never exits")
    name = "disagreement" if labels is None else "accuracy-loss"
    observed, p = float(loss_PN[step].mean()), float(p_P[step])
    return path[step], Promise(risk, 1 - delta, count, name, observed, p, step, len(path))


def check_rates(risk: float, delta: float) -> None:
    """Raises RequestError for a risk or a delta that is not between 0 and 1."""
    if not 0 < risk < 1 or not 0 < delta < 1:
        raise RequestError(f"risk {risk:g} and confidence {1 - delta:g} must lie between 0 and 1, such as 0.01 and 0.9")


def check_samples(count: int, risk: float, delta: float, *, with_labels: bool) -> None:
    """Raises RequestError where even a policy that loses nothing on `count` samples could not pass."""
    needed = samples_needed(risk, delta, with_labels=with_labels)
    if count < needed:
        raise RequestError(
            f"{count} samples cannot promise a risk of {risk:g} with confidence {1 - delta:g}: "
            f"it takes at least {needed}"
        )


def losses(policy: ExitPolicy, logits: Sequence[Tensor], labels: Tensor | None) -> Floats:
    """The loss of every sample, (n,): 1[other answer than the full model's], with labels 1[wrong] - 1[full wrong]."""
    answer_N, full_N = policy.answers(logits)[1], logits[-1].argmax(-1)
    if labels is None:
        return (answer_N != full_N).double().cpu().numpy()
    return ((answer_N != labels).double() - (full_N != labels).double()).cpu().numpy()


def p_values(loss_PN: Floats, risk: float, delta: float, *, signed: bool) -> Floats:
    """Of the hypotheses that the mean losses of rows of samples are above `risk`: (P,).

    Args:
        loss_PN: 0 or 1; signed: at most 1, in an order that does not depend on them.
        delta: only sets the stakes of signed losses.
    """
    count = loss_PN.shape[1]
    if not signed:
        return np.asarray(bdtr(loss_PN.sum(1), count, risk))  # the binomial distribution function
    i = np.arange(1, count + 1)
    mean = (0.5 + loss_PN.cumsum(1)) / (1 + i)
    variance = (0.25 + ((loss_PN - mean) ** 2).cumsum(1)) / (1 + i)
    before = np.concatenate([np.full((len(loss_PN), 1), 0.25), variance[:, :-1]], 1)
    stake = np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (count * before)))
    wealth = np.log1p(-stake * (loss_PN - risk)).cumsum(1)
    return np.asarray(np.exp(-np.maximum(0.0, wealth.max(1))))


def last_passed(p_P: Floats, delta: float) -> int:
    """The step before the first one that fails, in the order of the path; -1 where the first fails."""
    failed = np.flatnonzero(p_P > delta)
    return int(failed[0]) - 1 if len(failed) else len(p_P) - 1


def samples_needed(risk: float, delta: float, *, with_labels: bool) -> int:
    """The least number of samples with which a policy that loses nothing at all passes."""
    if not with_labels:
        return math.ceil(math.log(delta) / math.log1p(-risk))

    def passes(count: int) -> bool:
        return bool(p_values(np.zeros((1, count)), risk, delta, signed=True)[0] <= delta)

    most = 1
    while not passes(most):
        most *= 2
    return bisect_left(range(most), True, lo=most // 2, key=passes)


def risk_path(by_macs: Sequence[ExitPolicy], logits: Sequence[Tensor]) -> list[ExitPolicy]:
    """A path for `control_risk` through chosen policies, made on samples that it will not see.

    From "nobody leaves early", first ever larger parts of the shares that leave under the dearest policy, then the
    policies from the dearest to the cheapest.

    Args:
        by_macs: of one rule, by rising mean MACs, such as those of `ThresholdSearch.curve`; at least one.
        logits: (N, classes) of every exit, on the samples that they were chosen on.
    """
    dearest = by_macs[-1]
    shares = shares_of(dearest, logits)
    tight = [
        thresholds_for_shares(
            dearest, logits, [None if share is None else share * step / _TIGHT_STEPS for share in shares]
        )
        for step in range(1, _TIGHT_STEPS)
    ]
    never = replace(dearest, thresholds=(None,) * len(dearest.thresholds))
    return [never, *tight, *reversed(by_macs)]
