"""Thresholds by quota: how many samples shall leave at each exit, and the thresholds under which they do.

MSDNet's budgeted batch (Huang et al., ICLR 2018) sends shares proportional to q^k of all samples to exit k = 1..K (the
final one is K), for q = p / 20 and p = 1..39: most leave early where q < 1, late where q > 1.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import RequestError
from ...runtime.predict.policy import RULES, ExitPolicy, Rule, State

_QUOTAS = range(1, 40)


def thresholds_for_shares(policy: ExitPolicy, logits: Sequence[Tensor], leaving: Sequence[float | None]) -> ExitPolicy:
    """The policy under which, of the samples still there, the surest `leaving[k]` leave at exit k.

    Samples with equal scores leave together. An exit where nobody leaves is switched off, unless the rule remembers its
    answer.

    Args:
        policy: of any thresholds; rule, temperatures and weights stay.
        logits: (N, classes) of every exit, early first, the final one last.
        leaving: 0..1 per early exit; None = off.

    Raises:
        RequestError: another number of shares than of early exits.
    """
    if not len(logits) - 1 == len(leaving) == len(policy.thresholds):
        raise RequestError(f"{len(leaving)} shares for {len(logits) - 1} early exits and {policy.thresholds}")
    rule = RULES[policy.rule]
    thresholds: list[float | None] = []
    there_N = torch.ones(len(logits[-1]), dtype=torch.bool)
    state: State = ()
    for k, share in enumerate(leaving):
        count = 0 if share is None else round(share * int(there_N.sum()))
        if share is None or (count == 0 and not rule.remembers):
            thresholds.append(None)
            continue
        score_N, state = policy.score(k, logits[k], state)
        # Nobody reaches 1; no more exits can have agreed than there were.
        threshold = _threshold(rule, score_N[there_N], count) if count else min(k + 1.0, rule.bounds[1])
        thresholds.append(threshold)
        there_N &= ~(score_N >= threshold if rule.high_leaves else score_N <= threshold)
    return replace(policy, thresholds=tuple(thresholds))


def _threshold(rule: Rule, score_N: Tensor, count: int) -> float:
    """Between the last of the `count` surest scores and the next one."""
    low, high = rule.bounds
    score_N = score_N.double().sort(descending=rule.high_leaves).values
    last = score_N[count - 1]
    rest = score_N[score_N < last if rule.high_leaves else score_N > last]
    if len(rest) == 0:
        return low if rule.high_leaves else high
    middle = float(last + rest[0]) / 2
    return middle if math.isfinite(high) else max(low, float(math.ceil(middle)))  # agreements are whole numbers


def shares_of(policy: ExitPolicy, logits: Sequence[Tensor]) -> list[float | None]:
    """Which share of the samples that reach each early exit leaves there: what `thresholds_for_shares` takes."""
    exits = len(logits) - 1
    counts = torch.bincount(policy.exit_of(logits), minlength=exits + 1).tolist()
    reached = [sum(counts[k:]) for k in range(exits)]
    return [counts[k] / max(1, reached[k]) if policy.is_on(k) else None for k in range(exits)]


def quota_shares(exits: int) -> list[list[float]]:
    """The 39 budgeted-batch quotas of `exits` early exits, as shares of those still there; eager ones first."""
    quotas = []
    for p in _QUOTAS:
        parts = [(p / 20) ** k for k in range(1, exits + 2)]
        quotas.append([parts[k] / sum(parts[k:]) for k in range(exits)])
    return quotas
