"""Thresholds by quota: how many samples shall leave at each exit, and the thresholds under which they do.

MSDNet's budgeted batch (Huang et al., ICLR 2018) sends shares proportional to q^k of all samples to exit k = 1..K (the
final one is K), for q = p / 20 and p = 1..39: most leave early where q < 1, late where q > 1.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import RequestError
from ..runtime.policy import RULES, ExitPolicy, Rule, State

_QUOTAS = range(1, 40)


def thresholds_for_shares(policy: ExitPolicy, logits: Sequence[Tensor], leaving: Sequence[float]) -> ExitPolicy:
    """The policy under which, of the samples still there, the surest `leaving[k]` leave at exit k.

    Samples with equal scores leave together. A share of 0 switches the exit off, and so does one that rounds to nobody,
    unless the rule remembers the exit's answer.

    Args:
        policy: of any thresholds; rule, temperatures and weights stay.
        logits: (N, classes) of every exit, early first, the final one last.
        leaving: 0..1 per early exit.

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
        count = max(round(share * int(there_N.sum())), int(rule.remembers)) if share > 0 else 0
        if count == 0 or not bool(there_N.any()):
            thresholds.append(None)
            continue
        score_N, state = policy.score(k, logits[k], state)
        threshold = _threshold(rule, score_N[there_N], count)
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


def shares_of(policy: ExitPolicy, logits: Sequence[Tensor]) -> list[float]:
    """Which share of the samples that reach each early exit leaves there: what `thresholds_for_shares` takes."""
    exits = len(logits) - 1
    counts = torch.bincount(policy.exit_of(logits), minlength=exits + 1).tolist()
    reached = [sum(counts[k:]) for k in range(exits)]
    return [count / reach if reach else 0.0 for count, reach in zip(counts, reached, strict=False)]


def quota_shares(exits: int) -> list[list[float]]:
    """The 39 budgeted-batch quotas of `exits` early exits, as shares of those still there; eager ones first."""
    quotas = []
    for p in _QUOTAS:
        parts = [(p / 20) ** k for k in range(1, exits + 2)]
        quotas.append([parts[k] / sum(parts[k:]) for k in range(exits)])
    return quotas
