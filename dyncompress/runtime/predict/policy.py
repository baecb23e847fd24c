"""Exit policies: which samples leave at which exit.

With p = softmax(z / T), a sample leaves at exit k when

max-softmax   max p >= threshold                                   (Guo et al. 2017; Kaya et al. 2019)
margin        p of the first class - p of the second >= threshold
entropy       H(p) / ln C <= threshold                             (BranchyNet; normalised as in FastBERT)
energy        1/2 + e / (2 + 2|e|) >= threshold, e = logsumexp(z / T) - ln C   (Liu et al. 2020; all logits zero: 1/2)
patience      the exits' answers agreed threshold times in a row   (PABEE, Zhou et al. 2020)
learned       sigmoid(w_k . [max p, entropy, margin, a / (a + 1)] + b_k) >= threshold, a agreements in a row
                                                                   (after EENet, Ilhan et al. 2024)

The last two remember the answers of the exits before; an exit that is off gives none.

A sample that no exit is sure of is answered by the final one or, with the ensemble as fallback, by the mean of the
probabilities p of all exits on its way, the final one included (SCAN, Zhang et al. 2019).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...errors import RequestError

# What a policy remembers of the exits before; nothing before the first or without memory. Of a rule (N,) int64 tensors,
# then, with the ensemble as fallback, the sum of the probabilities so far, (N, C).
State = tuple[Tensor, ...]


def max_softmax(z_NC: Tensor) -> Tensor:
    """The largest class probability of each row of logits, in [0, 1]; higher is surer."""
    return torch.softmax(z_NC, -1).amax(-1)


def normalized_entropy(z_NC: Tensor) -> Tensor:
    """The entropy of each row's class probabilities over ln C, in [0, 1]; lower is surer."""
    return torch.special.entr(torch.softmax(z_NC, -1)).sum(-1) / math.log(z_NC.shape[-1])


def margin(z_NC: Tensor) -> Tensor:
    """How far the largest class probability of each row is ahead of the second, in [0, 1]; higher is surer."""
    first_second_N2 = torch.softmax(z_NC, -1).topk(2, -1).values
    return first_second_N2[..., 0] - first_second_N2[..., 1]


def energy(z_NC: Tensor) -> Tensor:
    """The negative free energy of each row over that of zero logits, put into (0, 1); higher is surer."""
    e_N = torch.logsumexp(z_NC, -1) - math.log(z_NC.shape[-1])
    return 0.5 + 0.5 * e_N / (1 + e_N.abs())


def exit_features(z_NC: Tensor, agreed_N: Tensor) -> Tensor:
    """What the learned score sees of each sample: (N, 4), all in [0, 1]."""
    agreed = agreed_N / (agreed_N + 1)
    return torch.stack([max_softmax(z_NC), normalized_entropy(z_NC), margin(z_NC), agreed], -1)


def _patience(_: Tensor, agreed_N: Tensor, __: Sequence[float]) -> Tensor:
    return agreed_N.float()


def _learned(z_NC: Tensor, agreed_N: Tensor, weights: Sequence[float]) -> Tensor:
    features = exit_features(z_NC, agreed_N)
    return torch.sigmoid(features @ features.new_tensor(weights[:-1]) + weights[-1])


FEATURES = 4  # of `exit_features`

Fallback = Literal["final", "ensemble"]


@dataclass(frozen=True)
class Rule:
    """A score per sample, on which side of a threshold it leaves, and the thresholds there can be.

    score: of logits (N, C); with memory, of logits, agreements in a row (N,) and the exit's weights.
    """

    score: Callable[..., Tensor]
    high_leaves: bool = True
    bounds: tuple[float, float] = (0.0, 1.0)
    remembers: bool = False


RULES = {
    "max-softmax": Rule(max_softmax),
    "entropy": Rule(normalized_entropy, high_leaves=False),
    "margin": Rule(margin),
    "energy": Rule(energy),
    "patience": Rule(_patience, bounds=(1.0, math.inf), remembers=True),
    "learned": Rule(_learned, remembers=True),
}


def check_rule(rule: str) -> None:
    """Raises RequestError for a rule that does not exist."""
    if rule not in RULES:
        raise RequestError(f"unknown exit rule {rule!r}; the rules are: {', '.join(RULES)}")


def check_fallback(fallback: str) -> None:
    """Raises RequestError for a fallback that does not exist."""
    if fallback not in get_args(Fallback):
        raise RequestError(f"unknown fallback {fallback!r}; give {' or '.join(get_args(Fallback))}")


@dataclass(frozen=True)
class ExitPolicy:
    """One threshold and one temperature per early exit; threshold None (or infinite): that exit is off.

    Thresholds lie in [0, 1]; those of patience are counts from 1. `weights` are the learned rule's, four and a bias per
    early exit. `fallback` answers whom no exit is sure of; the ensemble reads `final_temperature`, the final exit's.

    Raises:
        RequestError: an unknown rule or fallback, or thresholds, temperatures and weights that do not fit it or each
            other.
    """

    rule: str
    thresholds: tuple[float | None, ...]
    temperatures: tuple[float, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    fallback: Fallback = "final"
    final_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_rule(self.rule)
        check_fallback(self.fallback)
        thresholds = [None if t is None or math.isinf(t) else float(t) for t in self.thresholds]
        temperatures = [float(t) for t in self.temperatures] or [1.0] * len(thresholds)
        if len(temperatures) != len(thresholds):
            raise RequestError(f"{len(thresholds)} thresholds but {len(temperatures)} temperatures; give one per exit")
        low, high = RULES[self.rule].bounds
        for k, threshold in enumerate(thresholds):
            if threshold is not None and not low <= threshold <= high:
                raise RequestError(
                    f"threshold {threshold} of exit {k} is not in [{low:g}, {high:g}]; None switches it off"
                )
        for k, temperature in enumerate([*temperatures, self.final_temperature]):
            if not 0 < temperature < math.inf:
                raise RequestError(f"temperature {temperature} of exit {k} is not a positive number")
        object.__setattr__(self, "thresholds", tuple(thresholds))
        object.__setattr__(self, "temperatures", tuple(temperatures))
        object.__setattr__(self, "weights", tuple(tuple(float(w) for w in row) for row in self.weights))
        self._check_weights()

    def _check_weights(self) -> None:
        rows = len(self.thresholds) if self.rule == "learned" else 0
        if len(self.weights) != rows or any(len(row) != FEATURES + 1 for row in self.weights):
            raise RequestError(
                f"rule {self.rule!r} with {len(self.thresholds)} exits takes {rows} rows of {FEATURES + 1} weights, "
                f"got {len(self.weights)} of {sorted({len(row) for row in self.weights})}"
            )
        if not all(math.isfinite(w) for row in self.weights for w in row):
            raise RequestError("the weights of the learned rule are not finite")

    @classmethod
    def never(cls, exits: int) -> "ExitPolicy":
        """The policy of `exits` early exits under which every sample runs to the end."""
        return cls("max-softmax", (None,) * exits)

    def is_on(self, k: int) -> bool:
        """Whether any sample may leave at exit `k`."""
        return self.thresholds[k] is not None

    def score(self, k: int, z_NC: Tensor, state: State = ()) -> tuple[Tensor, State]:
        """What the rule compares with the threshold of exit `k`, (N,), and what is remembered from then on."""
        z_NC = z_NC.float() / self.temperatures[k]
        score_N, remembered = self._score(k, z_NC, state)
        if self.fallback == "final":
            return score_N, remembered
        p_NC = torch.softmax(z_NC, -1)
        return score_N, (*remembered, p_NC + state[-1] if state else p_NC)

    def _score(self, k: int, z_NC: Tensor, state: State) -> tuple[Tensor, State]:
        rule = RULES[self.rule]
        if not rule.remembers:
            return rule.score(z_NC), ()
        answer_N = z_NC.argmax(-1)
        agreed_N = torch.zeros_like(answer_N) if not state else (state[1] + 1) * (answer_N == state[0])
        return rule.score(z_NC, agreed_N, self.weights[k] if self.weights else ()), (answer_N, agreed_N)

    def decide(self, k: int, z_NC: Tensor, state: State = ()) -> tuple[Tensor, State]:
        """Bool (N,): which samples leave at exit `k`, given its logits; none where the exit is off.

        state: what the call for the last exit that is on returned, for the same samples; its second result is the next.
        """
        threshold = self.thresholds[k]
        if threshold is None:
            return torch.zeros(len(z_NC), dtype=torch.bool, device=z_NC.device), state
        score_N, state = self.score(k, z_NC, state)
        return (score_N >= threshold if RULES[self.rule].high_leaves else score_N <= threshold), state

    def unsure(self, z_NC: Tensor, state: State, *, final: bool = True) -> Tensor:
        """What samples are answered that no exit is sure of, (N, C) logits: the fallback's.

        Args:
            z_NC: what the last exit that they came to says.
            state: after the last exit that is on, as for `decide`.
            final: whether the last exit they came to is the final one, which the state never knows.
        """
        if self.fallback == "final" or not state:
            return z_NC
        sum_NC = state[-1] + torch.softmax(z_NC.float() / self.final_temperature, -1) if final else state[-1]
        mean_NC = sum_NC / sum_NC.sum(-1, keepdim=True)
        return mean_NC.clamp(min=torch.finfo(mean_NC.dtype).tiny).log().to(z_NC.dtype)

    def exit_of(self, logits: Sequence[Tensor]) -> Tensor:
        """(N,) int64: the exit that answers each sample, from every exit's logits (N, C), the final ones last."""
        return self._walk(logits)[0]

    def answers(self, logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(N,) int64 each: the exit that answers each sample, as `exit_of`, and the class."""
        at_N, state = self._walk(logits)
        last_NC = self.unsure(logits[-1], state)
        classes_KN = torch.stack([z.argmax(-1) for z in (*logits[:-1], last_NC)])
        return at_N, classes_KN.gather(0, at_N[None])[0]

    def _walk(self, logits: Sequence[Tensor]) -> tuple[Tensor, State]:
        at_N = torch.full((len(logits[-1]),), len(logits) - 1, device=logits[-1].device)
        state: State = ()
        for k, z_NC in enumerate(logits[:-1]):
            leaves_N, state = self.decide(k, z_NC, state)
            at_N[leaves_N & (at_N == len(logits) - 1)] = k
        return at_N, state

    def to_dict(self) -> dict[str, Any]:
        """The policy in JSON's own types."""
        lists = {"thresholds": list(self.thresholds), "temperatures": list(self.temperatures)}
        plain: dict[str, Any] = {"rule": self.rule, **lists}
        if self.weights:
            plain["weights"] = [list(row) for row in self.weights]
        if self.fallback != "final":
            plain |= {"fallback": self.fallback, "final_temperature": self.final_temperature}
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ExitPolicy":
        """The policy that `to_dict` described."""
        missing = {"rule", "thresholds", "temperatures"} - set(data)
        if missing:
            raise RequestError(f"the exit policy lacks {', '.join(sorted(missing))}")
        weights = tuple(tuple(row) for row in data.get("weights", ()))
        unsure = {key: data[key] for key in ("fallback", "final_temperature") if key in data}
        return cls(data["rule"], tuple(data["thresholds"]), tuple(data["temperatures"]), weights, **unsure)


@dataclass(frozen=True)
class OperatingPolicy:
    """A policy and what it does on the calibration set: mean multiply-adds per sample, accuracy (0..1)."""

    mean_macs: float
    accuracy: float
    policy: ExitPolicy


def within_budget(table: Sequence[OperatingPolicy], macs: float) -> ExitPolicy:
    """The most accurate policy of a table with at most this many mean MACs per sample.

    Raises:
        RequestError: the table is empty, or even its cheapest policy costs more.
    """
    if not table:
        raise RequestError("this model has no table of budgets: `convert` makes one")
    allowed = [row for row in table if row.mean_macs <= macs]
    if not allowed:
        raise RequestError(f"a budget of {macs:.0f} MACs is below the least, {min(r.mean_macs for r in table):.0f}")
    return max(allowed, key=lambda row: (row.accuracy, -row.mean_macs)).policy
