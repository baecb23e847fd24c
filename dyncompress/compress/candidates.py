"""A choice among listed policies: by quota, by a genetic search, or whatever a rule with memory needs.

Every candidate is played on the calibration set once; `Candidates` answers the questions of `ThresholdSearch` from that
table. The genetic search (NSGA-II, Deb et al. 2002, by optuna) evolves the shares that leave at each exit, and so meets
no scale but [0, 1] whatever the rule; it starts from the quotas.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import RequestError
from ..runtime.policy import ExitPolicy
from .shares import quota_shares, thresholds_for_shares
from .thresholds import Floats, Ints, OperatingPoint

_TRIALS, _POPULATION = 500, 40
_OFF, _NOBODY = -0.2, -0.1  # a gene between the two switches its exit off, one from there to 0 lets nobody leave


@dataclass(frozen=True)
class Cached:
    """What policies are played on.

    logits: raw (N, classes) of every exit, early first, the final one last. labels: (N,) int64. stage_macs: multiply-
    adds of each stage for one sample without heads, one more than there are early exits; head_macs: of their heads.
    """

    logits: Sequence[Tensor]
    labels: Tensor
    stage_macs: Sequence[float]
    head_macs: Sequence[float]

    def rows(self, index: Tensor) -> "Cached":
        """Some of the samples only."""
        return replace(self, logits=[z[index] for z in self.logits], labels=self.labels[index])

    @cached_property
    def right(self) -> Tensor:
        """Bool (K + 1, N): which exit answers which sample rightly."""
        return torch.stack([z.argmax(-1) == self.labels for z in self.logits]).cpu()

    def costs(self, thresholds: Sequence[float | None]) -> Floats:
        """MACs of a sample that leaves at each exit, (K + 1,), the end last; heads of exits that are off are free."""
        heads = [0.0 if t is None else h for t, h in zip(thresholds, self.head_macs, strict=True)]
        return np.cumsum(np.asarray(self.stage_macs, np.float64) + np.array([*heads, 0.0]))

    def play(self, policy: ExitPolicy) -> OperatingPoint:
        """What a policy does on these samples."""
        at = policy.exit_of(self.logits).cpu()
        return OperatingPoint(
            thresholds=policy.thresholds,
            accuracy=float(self.right[at, torch.arange(len(at))].double().mean()),
            mean_macs=float(self.costs(policy.thresholds)[at.numpy()].mean()),
            shares=tuple((torch.bincount(at, minlength=len(self.logits)).double() / len(at)).tolist()),
        )


class Candidates:
    """Policies of one rule, told apart by their thresholds, played on the calibration set; so is "nobody leaves early".

    Raises:
        RequestError: no samples.
    """

    def __init__(self, policies: Sequence[ExitPolicy], cached: Cached) -> None:
        count, exits = len(cached.labels), len(cached.head_macs)
        if count == 0:
            raise RequestError("thresholds need at least one labelled sample")
        made: dict[tuple[float | None, ...], Ints] = {(None,) * exits: np.full(count, exits)}
        made |= {p.thresholds: p.exit_of(cached.logits).cpu().numpy() for p in policies}
        self.thresholds = list(made)
        self.at: Ints = np.stack(list(made.values()))
        self.right: Floats = cached.right.numpy()[self.at, np.arange(count)].astype(np.float64)
        self.macs: Floats = np.take_along_axis(np.stack([cached.costs(t) for t in made]), self.at, 1)

    def subset(self, rows: Ints) -> "Candidates":
        """The same policies, played on some of the samples only."""
        part = copy.copy(self)
        part.at, part.right, part.macs = self.at[:, rows], self.right[:, rows], self.macs[:, rows]
        return part

    @property
    def samples(self) -> int:
        """The number of samples."""
        return self.right.shape[1]

    @property
    def best_accuracy(self) -> float:
        """The highest accuracy (0..1) of all candidates."""
        return float(self.right.mean(1).max())

    def right_with(self, thresholds: Sequence[float | None]) -> Floats:
        """Whether each sample is answered rightly under a candidate's thresholds: (N,) of 0 and 1."""
        return self.right[self.thresholds.index(tuple(thresholds))]

    def for_accuracy(self, accuracy: float) -> OperatingPoint:
        """The least mean MACs with at least this accuracy (0..1).

        Raises:
            RequestError: no candidate reaches it.
        """
        reached, macs = self.right.mean(1), self.macs.mean(1)
        allowed = np.flatnonzero(reached >= accuracy - 1e-9)
        if len(allowed) == 0:
            raise RequestError(
                f"no thresholds reach an accuracy of {accuracy:.4f} on the calibration set, the best is "
                f"{self.best_accuracy:.4f}: allow a larger loss or train longer"
            )
        return self._point(allowed[np.lexsort((-reached[allowed], macs[allowed]))[0]])

    def for_macs(self, macs: float) -> OperatingPoint:
        """The best accuracy with at most this many mean MACs per sample.

        Raises:
            RequestError: every candidate costs more.
        """
        reached, spent = self.right.mean(1), self.macs.mean(1)
        allowed = np.flatnonzero(spent <= macs * (1 + 1e-9))
        if len(allowed) == 0:
            raise RequestError(
                f"no thresholds keep the mean within {macs:.0f} MACs, the least is {spent.min():.0f}: "
                "allow more or put the first exit earlier"
            )
        return self._point(allowed[np.lexsort((spent[allowed], -reached[allowed]))[0]])

    def curve(self, points: int = 20) -> list[OperatingPoint]:
        """The candidates that none beats in both accuracy and mean MACs, at most `points` of them, by rising MACs."""
        reached, macs = self.right.mean(1), self.macs.mean(1)
        order = np.lexsort((-reached, macs))
        best = np.maximum.accumulate(np.append(-1.0, reached[order]))
        front = order[best[1:] > best[:-1]]
        picked = np.unique(np.linspace(0, len(front) - 1, points).round().astype(int))
        return [self._point(i) for i in front[picked]]

    def _point(self, index: int) -> OperatingPoint:
        exits = len(self.thresholds[index])
        return OperatingPoint(
            thresholds=self.thresholds[index],
            accuracy=float(self.right[index].mean()),
            mean_macs=float(self.macs[index].mean()),
            shares=tuple((np.bincount(self.at[index], minlength=exits + 1) / self.samples).tolist()),
        )


def by_quota(template: ExitPolicy, cached: Cached) -> list[ExitPolicy]:
    """The 39 policies of budgeted batch classification; rule, temperatures and weights as the template's."""
    quotas = quota_shares(len(cached.head_macs))
    return [thresholds_for_shares(template, cached.logits, shares) for shares in quotas]


def by_genetic_search(
    template: ExitPolicy, cached: Cached, *, seed: int = 0, progress: bool = False
) -> list[ExitPolicy]:
    """All policies that NSGA-II met on its way to few errors and few MACs.

    Raises:
        RequestError: optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise RequestError("the genetic threshold search needs optuna: pip install optuna") from error

    exits = len(cached.head_macs)
    met: list[ExitPolicy] = []

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        genes = [trial.suggest_float(f"share{k}", _OFF, 1.0) for k in range(exits)]
        shares = [None if gene < _NOBODY else max(0.0, gene) for gene in genes]
        met.append(thresholds_for_shares(template, cached.logits, shares))
        point = cached.play(met[-1])
        return 1 - point.accuracy, point.mean_macs

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        sampler = optuna.samplers.NSGAIISampler(population_size=_POPULATION, seed=seed)
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        for shares in quota_shares(exits):
            study.enqueue_trial({f"share{k}": share for k, share in enumerate(shares)})
        with tqdm(total=_TRIALS, desc="thresholds", disable=not progress) as bar:
            study.optimize(objective, n_trials=_TRIALS, callbacks=[lambda *_: bar.update()])
    finally:
        optuna.logging.set_verbosity(verbosity)
    return met
