"""The exit policy of a trained dynamic model: temperatures, then thresholds, from the calibration set alone."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import RequestError
from ...runtime.predict.dynamic import DynamicModel
from ...runtime.predict.policy import RULES, ExitPolicy, OperatingPolicy
from ..options.choices import Fallback
from ..options.method_options import Leaving
from ..options.steps import Convert
from ..options.training_options import Run
from ..training.batches import LabelledData
from .calibrate import Calibration, calibrate_exits
from .call_costs import CallTimes, time_costs
from .candidates import Cached, Candidates, by_genetic_search, by_one_threshold, by_quota, collect_cached
from .goal import Goal
from .held_out_loss import held_out_slack
from .learned_score import fit_scorer
from .operating_points import OperatingPoint, Search
from .policy_report import CurvePoint, ExitReport, LatencyReport, PolicyReport, StaticPoint
from .risk import Promise, control_risk, risk_path

_PATH_POINTS = 100  # of the curve that risk control walks along


def choose_policy(
    dynamic: DynamicModel,
    calibration: LabelledData,
    *,
    max_loss: float = Convert.max_loss,
    macs: float | None = Convert.macs,
    latency: float | None = Convert.latency,
    leaving: Leaving = Convert.leaving,
    static_logits: Tensor | None = None,
    run: Run = Run(),
) -> PolicyReport:
    """Sets `dynamic.policy` for a stated accuracy loss, budget or risk, and `dynamic.table` for other budgets.

    Another goal is another call, no training.

    Args:
        calibration: map-style, of (inputs, int label), not trained on; samples with label -1 are left out.
        max_loss: accuracy (0..1) that may be lost on unseen samples. On the calibration set less is given away, see
            `held_out_loss`, unless more cannot be reached.
        macs, latency: instead, a budget: mean MACs, or mean milliseconds, as a share of the static model's.
        leaving: by which rule (`runtime.predict.policy`). Of the threshold searches, "grid" is exact on a grid
            (`thresholds`), "quota" tries 39 divisions of the samples (`quotas`), "genetic" evolves divisions, "uniform"
            tries one threshold for all exits (`candidates`). A risk holds for unseen samples with probability
            `confidence` (`risk`); one half of the samples then makes temperatures and thresholds, the other one the
            promise. Latency is measured on this device (`call_costs`), where every exit costs what its calls take; the
            cost is by default what the budget is of, else MACs.
        static_logits: (N, classes) on the labelled samples, of the static model, where the final exit is not that any
            more; losses count from the better one of the two.
        run: its seed is that of the division into halves and of the genetic search.

    Raises:
        RequestError: no labelled samples, too few for the promise, or thresholds that do what is asked do not exist.
    """
    goal = Goal(max_loss=max_loss, macs=macs, latency=latency, leaving=leaving)
    risk = leaving.risk
    samples = collect_cached(dynamic, calibration, run.device)
    tuning, promising = (samples, None) if risk is None else _halves(samples, run.seed)
    fitted = calibrate_exits(tuning.logits, tuning.labels)
    template = _template(leaving.rule, leaving.fallback, tuning, [c.temperature for c in fitted])
    if risk is not None and leaving.risk_of == "disagreement":
        tuning = replace(tuning, labels=tuning.logits[-1].argmax(-1))
    whole, timed = float(dynamic.static_macs), None
    if goal.least == "latency":
        timed = time_costs(dynamic, calibration, template, batch=leaving.latency_batch, device=run.device)
        tuning, whole = tuning.timed(timed), timed.static
    search = _search(goal, template, tuning, run)
    static_right = _static_right(samples, static_logits)
    promise: Promise | None = None
    if risk is not None and promising is not None:
        dynamic.policy, promise = _promise(search, template, tuning, promising, leaving, risk, run.seed)
    else:
        point = _within_loss(search, static_right, max_loss) if goal.budget is None else _within(search, goal, whole)
        dynamic.policy = replace(template, thresholds=point.thresholds)
    dynamic.table = _table(template, search.curve(), samples)
    in_time = None if timed is None else _in_time(timed, leaving.latency_batch, tuning.play(dynamic.policy))
    return _report(dynamic, samples, static_right, fitted, in_time, promise)


def _in_time(timed: CallTimes, batch: int, played: OperatingPoint) -> LatencyReport:
    assert played.cost_unit == "ms"
    parts = {"stages_ms": timed.stages, "heads_ms": timed.heads}
    return LatencyReport(batch=batch, static_ms=timed.static, mean_ms=played.mean_cost, **parts)


def _report(
    dynamic: DynamicModel, samples: Cached, static_right: Tensor, fitted: Sequence[Calibration],
    latency: LatencyReport | None, promise: Promise | None,
) -> PolicyReport:  # fmt: skip
    """What the chosen policy and the exits by themselves do."""
    chosen, alone = samples.play(dynamic.policy), samples.right.mean(1).tolist()
    rows = zip([*dynamic.exits, "output"], chosen.shares, alone, fitted, strict=True)
    return PolicyReport(
        samples=len(samples.labels),
        static=StaticPoint(accuracy=float(static_right.double().mean()), macs=dynamic.static_macs),
        final=StaticPoint(accuracy=alone[-1]),
        dynamic=CurvePoint(mean_macs=chosen.mean_cost, accuracy=chosen.accuracy),
        exits=tuple(ExitReport(at=at, share=share, accuracy_on_all=right, **vars(c)) for at, share, right, c in rows),
        policy=dynamic.policy,
        curve=tuple(CurvePoint(mean_macs=row.mean_macs, accuracy=row.accuracy) for row in dynamic.table),
        latency=latency,
        risk=promise,
    )


def _static_right(samples: Cached, static_logits: Tensor | None) -> Tensor:
    """(N,) bool: whether the model that losses count from answers rightly."""
    final = samples.logits[-1].argmax(-1) == samples.labels
    if static_logits is None:
        return final
    static = static_logits.argmax(-1) == samples.labels
    return static if static.sum() >= final.sum() else final


def _halves(cached: Cached, seed: int) -> tuple[Cached, Cached]:
    order = torch.randperm(len(cached.labels), generator=torch.Generator().manual_seed(seed))
    middle = len(order) // 2
    return cached.rows(order[:middle]), cached.rows(order[middle:])


def _template(rule: str, fallback: Fallback, cached: Cached, temperatures: Sequence[float]) -> ExitPolicy:
    """A policy of the rule whose thresholds are still to be chosen; the temperatures of all exits."""
    *early, final = temperatures
    if rule == "learned":
        policy = fit_scorer(cached.logits, cached.labels, early)
    else:
        policy = ExitPolicy(rule, (RULES[rule].bounds[0],) * len(early), tuple(early))
    return policy if fallback == "final" else replace(policy, fallback=fallback, final_temperature=final)


def _search(goal: Goal, template: ExitPolicy, cached: Cached, run: Run) -> Search:
    kind = goal.leaving.threshold_search or ("genetic" if goal.remembers else "grid")
    if kind == "grid":
        return cached.grid(template)
    if kind == "quota":
        return Candidates(by_quota(template, cached), cached)
    if kind == "uniform":
        return Candidates(by_one_threshold(template, cached), cached)
    return Candidates(by_genetic_search(template, cached, seed=run.seed, progress=run.shows_progress), cached)


def _within_loss(search: Search, static_right: Tensor, max_loss: float) -> OperatingPoint:
    static_accuracy = float(static_right.double().mean())
    target = static_accuracy - held_out_slack(search, static_right, max_loss)
    return search.for_accuracy(max(static_accuracy - max_loss, min(target, search.best_accuracy)))


def _within(search: Search, goal: Goal, whole: float) -> OperatingPoint:
    """Within the goal's share of what the static model costs."""
    budget, what = goal.budget or 0.0, "MACs" if goal.least == "macs" else "milliseconds"
    try:
        return search.for_cost(budget * whole)
    except RequestError as error:
        raise RequestError(
            f"no thresholds keep the mean within {budget:g} of the static model's {what}, the least is "
            f"{search.least_cost / whole:.2f}: allow more or put the first exit earlier"
        ) from error


def _promise(
    search: Search, template: ExitPolicy, tuning: Cached, promising: Cached, leaving: Leaving, risk: float, seed: int
) -> tuple[ExitPolicy, Promise]:
    delta = 1 - leaving.confidence
    by_macs = [replace(template, thresholds=point.thresholds) for point in search.curve(_PATH_POINTS)]
    path = risk_path(by_macs, tuning.logits)
    labels = promising.labels if leaving.risk_of == "accuracy-loss" else None
    policy, promise = control_risk(promising.logits, labels, path, risk=risk, delta=delta, seed=seed)
    if all(threshold is None for threshold in policy.thresholds):
        warnings.warn(
            f"no exit keeps the risk of {risk:g} with confidence {1 - delta:g} on {promise.samples} samples, so "
            "all are off: allow a larger risk, give more data or train the exits longer",
            stacklevel=3,
        )
    return policy, promise


def _table(template: ExitPolicy, points: Sequence[OperatingPoint], cached: Cached) -> list[OperatingPolicy]:
    """The points with what they do on all samples, by rising MACs."""
    policies = [replace(template, thresholds=point.thresholds) for point in points]
    played = [(cached.play(policy), policy) for policy in policies]
    rows = [OperatingPolicy(point.mean_cost, point.accuracy, policy) for point, policy in played]
    return sorted(rows, key=lambda row: row.mean_macs)
