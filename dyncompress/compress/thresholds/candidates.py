"""A choice among listed policies: by quota, of one threshold, by genetic search, or whatever a rule with memory needs.

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

from ...errors import RequestError
from ...passes.exits.stages import Stage, split_stages
from ...runtime.predict.dynamic import DynamicModel
from ...runtime.predict.policy import RULES, ExitPolicy, State
from ..evaluation.evaluate import collect_logits, ready
from ..training.batches import LabelledData, call, in_order
from ..training.losses import UNLABELLED
from .call_costs import CallTimes
from .operating_points import CostUnit, Floats, Ints, Objective, OperatingPoint, Search, exit_costs, lexargmin
from .quotas import quota_shares, thresholds_for_shares
from .thresholds import ThresholdSearch

_TRIALS, _POPULATION, _THRESHOLDS = 500, 40, 200
_OFF, _NOBODY = -0.2, -0.1  # a gene between the two switches its exit off, one from there to 0 lets nobody leave


@dataclass(frozen=True)
class Cached:
    """What policies are played on.

    logits: raw (N, classes) of every exit, early first, the final one last. labels: (N,) int64. stage_costs: of each
    stage for one sample without heads, one more than there are early exits; head_costs: of their heads. cost_unit:
    of both; `timed` has milliseconds.
    """

    logits: Sequence[Tensor]
    labels: Tensor
    stage_costs: Sequence[float]
    head_costs: Sequence[float]
    cost_unit: CostUnit = "MACs"

    def rows(self, index: Tensor) -> "Cached":
        """Some of the samples only."""
        return replace(self, logits=[z[index] for z in self.logits], labels=self.labels[index])

    def timed(self, times: CallTimes) -> "Cached":
        """The same samples, each of which costs milliseconds."""
        return replace(self, stage_costs=times.stages, head_costs=times.heads, cost_unit="ms")

    @cached_property
    def right(self) -> Floats:
        """(K + 1, N) of 0 and 1: which exit answers which sample rightly."""
        return np.stack([(z.argmax(-1) == self.labels).double().cpu().numpy() for z in self.logits])

    def play(self, policy: ExitPolicy) -> OperatingPoint:
        """What a policy does on these samples."""
        at, right = self.answered(policy)
        return OperatingPoint.of(policy.thresholds, at, right, self.costs(policy.thresholds)[at], self.cost_unit)

    def answered(self, policy: ExitPolicy) -> tuple[Ints, Floats]:
        """The exit that answers each sample under a policy, and whether rightly, 0 or 1: (N,) each."""
        at, answer = policy.answers(self.logits)
        return at.cpu().numpy(), (answer == self.labels).double().cpu().numpy()

    def costs(self, thresholds: Sequence[float | None]) -> Floats:
        """Costs of a sample that leaves at each exit, (K + 1,)."""
        return exit_costs(self.stage_costs, self.head_costs, [t is not None for t in thresholds])

    def grid(self, policy: ExitPolicy) -> ThresholdSearch:
        """The search over all thresholds of a policy's rule, at its temperatures."""
        calibrated = [z / t for z, t in zip(self.logits, (*policy.temperatures, 1.0), strict=True)]
        return ThresholdSearch(calibrated, self.labels, self.stage_costs, self.head_costs, policy.rule, self.cost_unit)


def collect_cached(dynamic: DynamicModel, data: LabelledData, device: torch.device | str | None = None) -> Cached:
    """The labelled samples of a data set, as `evaluate` takes it, with the costs of the model.

    A stage with skip gates costs what it does on average over the data.
    """
    logits, labels = collect_logits(dynamic, data, device=device)
    stages = split_stages(dynamic.trunk)
    saved = _mean_skipped(dynamic, stages, data, device)
    spent = [stage.macs - skipped for stage, skipped in zip(stages, saved, strict=True)]
    everything = Cached(logits, labels, spent, [s.head_macs for s in stages[:-1]])
    return everything.rows(labels != UNLABELLED)


def _mean_skipped(
    dynamic: DynamicModel, stages: Sequence[Stage], data: LabelledData, device: torch.device | str | None
) -> list[float]:
    """MACs of the branches that closed gates save, by stage: the mean over the samples, all of which run to the end."""
    if not dynamic.gates:
        return [0.0] * len(stages)
    whole = dynamic.with_policy(ExitPolicy.never(len(dynamic.exits)))
    with ready(whole, device) as where:
        ran = torch.cat([call(whole.predict, inputs).gates.cpu() for inputs, _ in in_order(data, 256, where)])
    closed = iter((~ran).double().mean(0).tolist())
    return [sum(next(closed) * macs for macs in stage.branch_macs) for stage in stages]


class Candidates(Search):
    """Policies of one rule, told apart by their thresholds, played on the calibration set; so is "nobody leaves early".

    Raises:
        RequestError: no samples.
    """

    def __init__(self, policies: Sequence[ExitPolicy], cached: Cached) -> None:
        count, exits = len(cached.labels), len(cached.head_costs)
        if count == 0:
            raise RequestError("thresholds need at least one labelled sample")
        self.cost_unit = cached.cost_unit
        made = {p.thresholds: cached.answered(p) for p in (ExitPolicy.never(exits), *policies)}
        self.thresholds = list(made)
        self.at, self.right = (np.stack(column) for column in zip(*made.values(), strict=True))
        self.spent: Floats = np.take_along_axis(np.stack([cached.costs(t) for t in made]), self.at, 1)

    def subset(self, rows: Ints) -> "Candidates":
        """The same policies, played on some of the samples only."""
        part = copy.copy(self)
        part.at, part.right, part.spent = self.at[:, rows], self.right[:, rows], self.spent[:, rows]
        return part

    @property
    def _tables(self) -> tuple[Floats, Floats]:
        return self.right.sum(1), self.spent.sum(1)

    def right_with(self, thresholds: Sequence[float | None]) -> Floats:
        """Whether each sample is answered rightly under a candidate's thresholds: (N,) of 0 and 1."""
        return self.right[self.thresholds.index(tuple(thresholds))]

    def _search(self, objective: Objective) -> OperatingPoint:
        return self._point(lexargmin(*objective(*self._tables)))

    def curve(self, points: int = 20) -> list[OperatingPoint]:
        """The candidates that none beats in both accuracy and mean cost, at most `points` of them, by rising cost."""
        reached, spent = self.right.mean(1), self.spent.mean(1)
        order = np.lexsort((-reached, spent))
        best = np.maximum.accumulate(np.append(-1.0, reached[order]))
        front = order[best[1:] > best[:-1]]
        picked = np.unique(np.linspace(0, len(front) - 1, points).round().astype(int))
        return [self._point(i) for i in front[picked]]

    def _point(self, index: int) -> OperatingPoint:
        return OperatingPoint.of(
            self.thresholds[index], self.at[index], self.right[index], self.spent[index], self.cost_unit
        )


def by_quota(template: ExitPolicy, cached: Cached) -> list[ExitPolicy]:
    """The 39 policies of budgeted batch classification; rule, temperatures and weights as the template's."""
    quotas = quota_shares(len(cached.head_costs))
    return [thresholds_for_shares(template, cached.logits, shares) for shares in quotas]


def by_one_threshold(template: ExitPolicy, cached: Cached) -> list[ExitPolicy]:
    """Policies with one threshold for all exits, at up to 200 of all their scores; the last has all exits off.

    It suits rules whose scores mean the same at every exit, as calibrated probabilities do and energies do not.
    """
    scores: list[Tensor] = []
    state: State = ()
    for k, logits in enumerate(cached.logits[:-1]):
        score, state = template.score(k, logits, state)
        scores.append(score.double())
    met = torch.cat(scores).clamp(*RULES[template.rule].bounds).unique()
    picked = met[torch.linspace(0, len(met) - 1, min(len(met), _THRESHOLDS)).round().long()].tolist()
    exits = len(scores)
    return [replace(template, thresholds=(threshold,) * exits) for threshold in (*picked, None)]


def by_genetic_search(
    template: ExitPolicy, cached: Cached, *, seed: int = 0, progress: bool = False
) -> list[ExitPolicy]:
    """All policies that NSGA-II met on its way to few errors and a low cost.

    Raises:
        RequestError: optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise RequestError("the genetic threshold search needs optuna: pip install optuna") from error

    exits = len(cached.head_costs)
    met: list[ExitPolicy] = []

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        genes = [trial.suggest_float(f"share{k}", _OFF, 1.0) for k in range(exits)]
        shares = [None if gene < _NOBODY else max(0.0, gene) for gene in genes]
        met.append(thresholds_for_shares(template, cached.logits, shares))
        point = cached.play(met[-1])
        return 1 - point.accuracy, point.mean_cost

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
