"""Exit policies: which samples leave at which exit.

max-softmax   leave when max softmax(z / T) >= threshold           (Guo et al. 2017; Kaya et al. 2019)
entropy       leave when H(softmax(z / T)) / ln C <= threshold     (BranchyNet; normalised as in FastBERT)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError


def max_softmax(z_NC: Tensor) -> Tensor:
    """The largest class probability of each row of logits, in [0, 1]; higher is surer."""
    return torch.softmax(z_NC, -1).amax(-1)


def normalized_entropy(z_NC: Tensor) -> Tensor:
    """The entropy of each row's class probabilities over ln C, in [0, 1]; lower is surer."""
    return torch.special.entr(torch.softmax(z_NC, -1)).sum(-1) / math.log(z_NC.shape[-1])


@dataclass(frozen=True)
class Rule:
    """A score for each row of logits, and on which side of a threshold a sample leaves."""

    score: Callable[[Tensor], Tensor]
    high_leaves: bool


RULES = {"max-softmax": Rule(max_softmax, True), "entropy": Rule(normalized_entropy, False)}


@dataclass(frozen=True)
class ExitPolicy:
    """One threshold in [0, 1] and one temperature per early exit; threshold None (or infinite): that exit is off.

    Raises:
        RequestError: an unknown rule, or thresholds and temperatures that do not fit it or each other.
    """

    rule: str
    thresholds: tuple[float | None, ...]
    temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise RequestError(f"unknown exit rule {self.rule!r}; the rules are: {', '.join(RULES)}")
        thresholds = [None if t is None or math.isinf(t) else float(t) for t in self.thresholds]
        temperatures = [float(t) for t in self.temperatures] or [1.0] * len(thresholds)
        if len(temperatures) != len(thresholds):
            raise RequestError(f"{len(thresholds)} thresholds but {len(temperatures)} temperatures; give one per exit")
        for k, threshold in enumerate(thresholds):
            if threshold is not None and not 0 <= threshold <= 1:
                raise RequestError(f"threshold {threshold} of exit {k} is not in [0, 1]; None switches it off")
        for k, temperature in enumerate(temperatures):
            if not 0 < temperature < math.inf:
                raise RequestError(f"temperature {temperature} of exit {k} is not a positive number")
        object.__setattr__(self, "thresholds", tuple(thresholds))
        object.__setattr__(self, "temperatures", tuple(temperatures))

    @classmethod
    def never(cls, exits: int) -> "ExitPolicy":
        """The policy of `exits` early exits under which every sample runs to the end."""
        return cls("max-softmax", (None,) * exits)

    def is_on(self, k: int) -> bool:
        """Whether any sample may leave at exit `k`."""
        return self.thresholds[k] is not None

    def leaves(self, k: int, z_NC: Tensor) -> Tensor:
        """Bool (N,): which samples leave at exit `k`, given its logits; none where the exit is off."""
        threshold, rule = self.thresholds[k], RULES[self.rule]
        if threshold is None:
            return torch.zeros(len(z_NC), dtype=torch.bool, device=z_NC.device)
        score_N = rule.score(z_NC.float() / self.temperatures[k])
        return score_N >= threshold if rule.high_leaves else score_N <= threshold

    def to_dict(self) -> dict[str, Any]:
        """The policy in JSON's own types."""
        return {
            "rule": self.rule,
            "thresholds": list(self.thresholds),
            "temperatures": list(self.temperatures),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ExitPolicy":
        """The policy that `to_dict` described."""
        missing = {"rule", "thresholds", "temperatures"} - set(data)
        if missing:
            raise RequestError(f"the exit policy lacks {', '.join(sorted(missing))}")
        return cls(data["rule"], tuple(data["thresholds"]), tuple(data["temperatures"]))


def expected_macs(exit_macs: Sequence[int], shares: Sequence[float]) -> float:
    """Mean MACs per sample when `shares[k]` of the samples leave at exit `k` (the last entry: at the end)."""
    if len(exit_macs) != len(shares):
        raise RequestError(f"{len(exit_macs)} exits (the end included) but {len(shares)} shares")
    return sum(m * s for m, s in zip(exit_macs, shares, strict=True))
