"""The learned exit score: per exit, a logistic regression on what the exit shows of its own certainty.

    score_k = sigmoid(w_k . [max p, entropy, margin, a / (a + 1)] + b_k)

is fitted to the probability that nothing is lost by leaving: exit k is right, or the final one is wrong too (after
EENet, Ilhan et al., WACV 2024, whose scorers see such features). Five ridge-regularised numbers per exit hardly overfit
a calibration set.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ...runtime.predict.policy import FEATURES, ExitPolicy, State, exit_features


def fit_scorer(logits: Sequence[Tensor], labels: Tensor, temperatures: Sequence[float]) -> ExitPolicy:
    """A policy of the learned rule with fitted weights, all exits on, thresholds still to be chosen.

    Args:
        logits: raw (N, classes) of every exit, early first, the final one last; labels: (N,) int64.
        temperatures: one per early exit.
    """
    exits = len(logits) - 1
    remembers = ExitPolicy("patience", (1.0,) * exits, tuple(temperatures))
    final_wrong = logits[-1].argmax(-1) != labels
    weights: list[tuple[float, ...]] = []
    state: State = ()
    for k, z in enumerate(logits[:-1]):
        agreed, state = remembers.score(k, z, state)
        features = exit_features(z.float() / temperatures[k], agreed)
        weights.append(_logistic(features, (z.argmax(-1) == labels) | final_wrong))
    return replace(remembers, rule="learned", thresholds=(0.5,) * exits, weights=tuple(weights))


def _logistic(features_NF: Tensor, safe_N: Tensor) -> tuple[float, ...]:
    """Weights and bias."""
    safe = int(safe_N.sum())
    if safe in {0, len(safe_N)}:  # nothing to tell apart: the rule of succession
        return (*([0.0] * FEATURES), math.log((safe + 1) / (len(safe_N) - safe + 1)))
    fitted = LogisticRegression().fit(features_NF.numpy(), safe_N.numpy())
    return (*fitted.coef_[0].tolist(), float(fitted.intercept_[0]))
