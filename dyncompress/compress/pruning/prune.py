"""Structured pruning: rank every group of the model, remove the least important down to a target, at once or in steps.

In N steps the k-th leaves target^(k/N), so that each removes the same share of what is left; the model is trained in
between and ranked anew (Molchanov et al., ICLR 2017, section 2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from torch import fx, nn

from ...errors import RequestError
from ...passes.axes.axes import Axes, as_keep, infer_axes
from ...passes.dims.dims import Keep
from ...passes.graph.inputs import Inputs
from ...passes.shrink.plan import plan_axes
from ...passes.shrink.shrink import shrink_axes
from ..importance.scores import COMPARABLE, Context, Scores, check_importance, score_axes
from ..options.choices import Importance
from ..options.limits import Limits
from ..options.method_options import Cuts
from ..options.steps import Prune
from ..options.training_options import Run, Training
from ..training.batches import HasSplits, LabelledData, captured, training_part
from ..training.losses import Distilled, check_share, cross_entropy
from ..training.store import Store
from .after_cut import check_finetune, train_after_cut
from .cost_left import one_target, share_left
from .kept_indices import Kept
from .latency import Latency
from .latency_choice import choose_by_latency
from .ranking import candidates, check_scope, default_scope
from .removal_search import choose
from .reports import CutReport, PruneReport

_CUTS = "cuts.pt"


def prune(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    data: HasSplits | LabelledData | None = None,
    ratio: float | None = Prune.ratio,
    macs: float | None = Prune.macs,
    params: float | None = Prune.params,
    bytes: float | None = Prune.bytes,
    latency: float | None = Prune.latency,
    importance: Importance = Prune.importance,
    finetune: int = Prune.finetune,
    limits: Limits = Prune.limits,
    cuts: Cuts = Prune.cuts,
    training: Training = Prune.training,
    run: Run = Run(),
) -> fx.GraphModule:
    """A physically smaller copy of `model`, its least important channels, heads, neurons and hidden states removed.

    What was done is in `PruneReport.of(result)`: the share that is left after each step, and the kind, size and kept
    indices of every axis of the original. With data, BatchNorm statistics are measured anew after every cut.

    Args:
        model: any model `capture` takes, or an already captured one (then without `example_inputs`).
        example_inputs: one call's inputs, batch first; None = taken from the data.
        data: map-style, of (inputs, int label), or an object with such a `train` set; needed by taylor, hessian,
            activation and for training.
        The options are those of `options.steps.Prune`, in shares of what the model has, in (0, 1].

    Raises:
        RequestError: not exactly one target or one out of reach, unknown names, unfit data, weights not finite.
        DynCompressError: the training failed.
    """
    asked = Prune(
        ratio=ratio, macs=macs, params=params, bytes=bytes, latency=latency, importance=importance,
        finetune=finetune, limits=limits, cuts=cuts, training=training,
    )  # fmt: skip
    metric, target = one_target({"ratio": ratio, "macs": macs, "params": params, "bytes": bytes, "latency": latency})
    train = training_part(data)
    _check(asked, run.seed, train)
    gm = captured(model, example_inputs, data)
    job = _Job(gm, asked, metric, Context(train, seed=run.seed, progress=run.shows_progress))
    request = job.request | {metric: target, "seed": run.seed}
    store = Store(run.run_dir, _CUTS, request, resume=run.resume, holds=("cuts",))
    return _in_steps(job, gm, _schedule(target, cuts.steps), store, run)


def _check(asked: Prune, seed: int, data: LabelledData | None) -> None:
    check_importance(asked.importance)
    if asked.cuts.scope is not None:
        check_scope(asked.cuts.scope)
    if asked.cuts.steps < 1:
        raise RequestError(f"steps is the number of cuts, at least 1; got {asked.cuts.steps}")
    if seed < 0:
        raise RequestError(f"seed is {seed}: give a number that is not negative")
    check_finetune(asked.finetune, data)
    check_share(asked.cuts.distill)
    if asked.cuts.distill and not asked.finetune:
        raise RequestError("distill is a share of the loss of fine-tuning: give finetune, a number of epochs")


def _schedule(target: float, steps: int) -> list[float]:
    """The share that each step leaves: a geometric series that ends at the target."""
    return [target ** (step / steps) for step in range(1, steps + 1)]


def _in_steps(job: "_Job", gm: fx.GraphModule, goals: Sequence[float], store: Store, run: Run) -> fx.GraphModule:
    """Cuts and trains once per goal, a share of what the first model has; cuts that were made are made again."""
    axes = infer_axes(gm)
    whole, kept, done = {axis.name: axis.size for axis in axes}, Kept(axes), list[CutReport]()
    left = 1.0
    cuts = [Cut(**cut) for cut in store.saved["cuts"]] if store.saved is not None else []
    for number, goal in enumerate(goals, 1):
        axes = axes if number == 1 else infer_axes(gm)
        if number > len(cuts):
            cuts.append(job.choose(axes, min(1.0, goal / left), whole))
            store.save({"cuts": [asdict(made) for made in cuts]})
        cut = cuts[number - 1]
        keep = as_keep(axes, cut.keep)
        kept.cut(plan_axes(axes, keep))
        gm = shrink_axes(axes, keep, exact=job.asked.cuts.exact)
        left *= cut.left
        done.append(CutReport(goal=goal, left=left, **cut.note))
        job.train(gm, run.part(f"cut-{number}"))
    report = PruneReport(metric=job.metric, importance=job.asked.importance, steps=tuple(done), kept=kept.table())
    report.keep_in(gm)
    return gm


@dataclass(frozen=True)
class Cut:
    """Kept indices by axis name, the share of the target that they leave, and what else there is to tell."""

    keep: dict[str, list[int]]
    left: float
    note: dict[str, float]


@dataclass(frozen=True)
class _Job:
    """How one cut is chosen, and trained after. `whole` is the model as it came."""

    whole: fx.GraphModule
    asked: Prune
    metric: str
    context: Context

    @property
    def limits(self) -> Limits:
        """By latency, None rounds by what hardware likes."""
        given = self.asked.limits
        return given if self.metric == "latency" else replace(given, round_to=given.round_to or 1)

    @property
    def scope(self) -> str | None:
        """None: both are tried."""
        by_default = None if self.metric == "latency" else default_scope(self.asked.limits.depth)
        return self.asked.cuts.scope or by_default

    @property
    def request(self) -> dict[str, object]:
        """What must be the same for a run to continue."""
        cuts, limits = self.asked.cuts, {**asdict(self.limits), "ignore": list(self.limits.ignore)}
        how = {"scope": self.scope, "steps": cuts.steps, "exact": cuts.exact, "distill": cuts.distill}
        return {"importance": self.asked.importance, "finetune": self.asked.finetune, **how, **limits}

    def choose(self, axes: Axes, target: float, sizes: Mapping[str, int]) -> Cut:
        """What to keep for `target`, a share of what the model has; `sizes` are the first model's by axis."""
        free, importance = candidates(axes, self.limits), self.asked.importance
        scores = score_axes(axes.types.gm, free, importance, self.context)
        if self.metric == "latency":
            return self._by_latency(axes, scores, target, sizes)
        keep = choose(
            axes, scores, self.metric, target, self.limits,
            scope=self.scope or "global", comparable=importance in COMPARABLE, whole=sizes,
        )  # fmt: skip
        return Cut(_named(axes, keep), share_left(axes, self.metric, free)(keep), {})

    def _by_latency(self, axes: Axes, scores: Scores, target: float, sizes: Mapping[str, int]) -> Cut:
        clock = Latency(axes, self.asked.cuts.latency_batch, progress=self.context.progress)
        found = choose_by_latency(
            axes, scores, target, self.limits, clock, exact=self.asked.cuts.exact,
            scope=self.scope, comparable=self.asked.importance in COMPARABLE, whole=sizes,
        )  # fmt: skip
        note = {"predicted": found.predicted, "measured": found.measured, "whole_ms": found.whole_ms}
        return Cut(_named(axes, found.keep), found.measured, note)

    def train(self, gm: fx.GraphModule, run: Run) -> None:
        """What follows a cut where there is data: new statistics, then training, if it was asked for."""
        share, data = self.asked.cuts.distill, self.context.data
        loss_fn, teacher = (Distilled(cross_entropy, share), self.whole) if share else (cross_entropy, None)
        epochs, training = self.asked.finetune, self.asked.training
        train_after_cut(gm, data, epochs, training, run, loss_fn=loss_fn, teacher=teacher)


def _named(axes: Axes, keep: Keep) -> dict[str, list[int]]:
    return {axis.name: keep[axis.atom].tolist() for axis in axes if axis.atom in keep}
