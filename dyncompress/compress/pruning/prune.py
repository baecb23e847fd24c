"""Structured pruning: rank every group of the model, remove the least important down to a target, at once or in steps.

In N steps the k-th leaves target^(k/N), so that each removes the same share of what is left; the model is trained in
between and ranked anew (Molchanov et al., ICLR 2017, section 2).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ...errors import RequestError
from ...passes.axes.axes import Axes, as_keep, infer_axes
from ...passes.capture.capture import capture
from ...passes.dims.dims import Keep
from ...passes.graph.inputs import Inputs
from ...passes.graph.meta import is_captured
from ...passes.shrink.plan import plan_axes
from ...passes.shrink.shrink import shrink_axes
from ..importance.scores import COMPARABLE, Context, Scores, check_importance, score_axes
from ..training.batches import LabelledData
from ..training.losses import Distilled, cross_entropy
from ..training.recalibrate import recalibrate_batchnorm
from ..training.store import Store
from ..training.trainer import fit
from .cost_left import one_target, share_left
from .kept_indices import Kept
from .latency import Latency
from .latency_choice import choose_by_latency
from .ranking import Limits, check_scope, default_scope
from .removal_search import choose
from .reports import CutReport, PruneReport

RECALIBRATION_BATCHES = 32

_CUTS = "cuts.pt"

__all__ = ["Limits", "choose", "prune"]


def prune(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    ratio: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    latency: float | None = None,
    importance: str = "l2",
    data: LabelledData | None = None,
    scope: str | None = None,
    floor: float = 0.1,
    ceiling: float = 1.0,
    round_to: int | None = None,
    ignore: Sequence[str] = (),
    exact: bool = False,
    depth: bool = False,
    latency_batch: int = 1,
    steps: int = 1,
    finetune: int = 0,
    distill: float = 0.0,
    lr: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
    mixed_precision: str | None = None,
    device: torch.device | str | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
) -> fx.GraphModule:
    """A physically smaller copy of `model`, its least important channels, heads, neurons and hidden states removed.

    What was done is in `PruneReport.of(result)`: the share that is left after each step, and the kind, size and kept
    indices of every axis of the original.

    Args:
        model: any model `capture` takes, or an already captured one (then without `example_inputs`).
        ratio, macs, params, bytes, latency: give one: the share of channels, multiply-adds, parameters, bytes of
            parameters and buffers, or of the measured wall clock on the model's device that stays, in (0, 1].
        importance: "l1", "l2", "taylor", "hessian", "bn-scale", "geometric-median", "lamp", "activation" or "random"
            (`compress.importance`).
        data: map-style, of (inputs, int label); needed by taylor, hessian, activation and for training.
        scope: "global": all groups compete; "axis" or "block": every axis, or every block, loses the same share.
            None: "axis"; "global" with `depth`; with `latency` both are tried.
        floor, ceiling: least and largest share of each axis that stays.
        round_to: kept counts are multiples of this; None = 1, and with `latency` 8 or 16 where an axis is wide.
        ignore: module or parameter names whose axes stay whole.
        exact: norms keep their old counts (see `shrink`).
        depth: whole residual branches may go as well.
        latency_batch: samples per call when `latency` is measured.
        steps: number of cuts. With more than one, and data, BatchNorm statistics are measured anew after each.
        finetune: epochs of training on `data` after each cut; `lr` is its peak learning rate.
        distill: the share of that training's loss that compares with the answers of the model as it came, 0..1.
        mixed_precision, device, run_dir, resume: see `trainer.fit`; run_dir keeps every step to resume from.
        progress: progress bars on standard error.

    Raises:
        RequestError: not exactly one target, a target out of reach, an unknown importance, scope or ignored name, data
            missing or unfit, weights that are not finite.
        DynCompressError: the training failed.
    """
    metric, target = one_target({"ratio": ratio, "macs": macs, "params": params, "bytes": bytes, "latency": latency})
    step_size = 1 if round_to is None and metric != "latency" else round_to
    limits = Limits(floor, step_size, tuple(ignore), ceiling, depth)
    scope = scope or (None if metric == "latency" else default_scope(depth))
    _check(importance, scope, steps, finetune, seed, data)
    loss_fn = Distilled(cross_entropy, distill) if distill else cross_entropy
    if distill and not finetune:
        raise RequestError("distill is a share of the loss of fine-tuning: give finetune, a number of epochs")
    gm = model if is_captured(model) else _captured(model, example_inputs)
    context = Context(data, seed=seed, progress=progress)
    job = _Job(metric, importance, scope, limits, exact, latency_batch, context)
    training: dict[str, Any] = {"lr": lr, "batch_size": batch_size, "mixed_precision": mixed_precision}
    training |= {"device": device, "loss_fn": loss_fn, "teacher": gm if distill else None}
    request = {metric: target, "importance": importance, "scope": scope, "steps": steps, "finetune": finetune}
    request |= {**asdict(limits), "ignore": list(ignore), "exact": exact, "seed": seed, "distill": distill}
    store = Store(run_dir, _CUTS, request, resume=resume, holds=("cuts",))
    return _in_steps(job, gm, _schedule(target, steps), finetune, training, store)


def _check(importance: str, scope: str | None, steps: int, finetune: int, seed: int, data: LabelledData | None) -> None:
    check_importance(importance)
    if scope is not None:
        check_scope(scope)
    if steps < 1:
        raise RequestError(f"steps is the number of cuts, at least 1; got {steps}")
    if finetune < 0:
        raise RequestError(f"finetune is a number of epochs, 0 or more; got {finetune}")
    if seed < 0:
        raise RequestError(f"seed is {seed}: give a number that is not negative")
    if finetune and data is None:
        raise RequestError("finetune needs data: a dataset of (input, label)")


def _captured(model: nn.Module, example_inputs: Inputs | None) -> fx.GraphModule:
    if example_inputs is None:
        raise RequestError("prune needs example_inputs to capture the model")
    return capture(model, example_inputs)


def _schedule(target: float, steps: int) -> list[float]:
    """The share that each step leaves: a geometric series that ends at the target."""
    return [target ** (step / steps) for step in range(1, steps + 1)]


def _in_steps(
    job: "_Job", gm: fx.GraphModule, goals: Sequence[float], finetune: int, training: dict[str, Any], store: Store
) -> fx.GraphModule:
    """Cuts and trains once per goal, a share of what the first model has; cuts that were made are made again."""
    axes = infer_axes(gm)
    whole, kept, done = {axis.name: axis.size for axis in axes}, Kept(axes), list[CutReport]()
    data, left = job.context.data, 1.0
    cuts = [Cut(**cut) for cut in store.saved["cuts"]] if store.saved is not None else []
    for number, goal in enumerate(goals, 1):
        axes = axes if number == 1 else infer_axes(gm)
        if number > len(cuts):
            cuts.append(job.choose(axes, min(1.0, goal / left), whole))
            store.save({"cuts": [asdict(made) for made in cuts]})
        cut = cuts[number - 1]
        keep = as_keep(axes, cut.keep)
        kept.cut(plan_axes(axes, keep))
        gm = shrink_axes(axes, keep, exact=job.exact)
        left *= cut.left
        done.append(CutReport(goal=goal, left=left, **cut.note))
        if data is not None and (finetune or len(goals) > 1):
            recalibrate_batchnorm(gm, data, batches=RECALIBRATION_BATCHES, seed=job.context.seed)
        if data is not None and finetune:
            folder = None if store.folder is None else store.folder / f"cut-{number}"
            _train(gm, data, finetune, job.context, training, folder)
    report = PruneReport(metric=job.metric, importance=job.importance, steps=tuple(done), kept=kept.table())
    report.keep_in(gm)
    return gm


def _train(
    gm: fx.GraphModule, data: LabelledData, epochs: int, context: Context, training: dict[str, Any], folder: Path | None
) -> None:
    resume = folder is not None
    own: dict[str, Any] = {"seed": context.seed, "progress": context.progress, "run_dir": folder, "resume": resume}
    fit(gm, dataset=data, epochs=epochs, **own, **training)


@dataclass(frozen=True)
class Cut:
    """Kept indices by axis name, the share of the target that they leave, and what else there is to tell."""

    keep: dict[str, list[int]]
    left: float
    note: dict[str, float]


@dataclass(frozen=True)
class _Job:
    """How to choose what goes in one cut."""

    metric: str
    importance: str
    scope: str | None
    limits: Limits
    exact: bool
    latency_batch: int
    context: Context

    def choose(self, axes: Axes, target: float, whole: Mapping[str, int]) -> Cut:
        """What to keep for `target`, a share of what the model has; `whole` are the first model's sizes by axis."""
        candidates = self.limits.candidates(axes)
        scores = score_axes(axes.types.gm, candidates, self.importance, self.context)
        options: dict[str, Any] = {
            "scope": self.scope,
            "comparable": self.importance in COMPARABLE,
            "whole": whole,
        }
        if self.metric == "latency":
            return self._by_latency(axes, scores, target, options)
        keep = choose(axes, scores, self.metric, target, self.limits, **options)
        return Cut(_named(axes, keep), share_left(axes, self.metric, candidates)(keep), {})

    def _by_latency(self, axes: Axes, scores: Scores, target: float, options: dict[str, Any]) -> Cut:
        clock = Latency(axes, self.latency_batch, progress=self.context.progress)
        found = choose_by_latency(axes, scores, target, self.limits, clock, exact=self.exact, **options)
        note = {"predicted": found.predicted, "measured": found.measured, "whole_ms": found.whole_ms}
        return Cut(_named(axes, found.keep), found.measured, note)


def _named(axes: Axes, keep: Keep) -> dict[str, list[int]]:
    return {axis.name: keep[axis.atom].tolist() for axis in axes if axis.atom in keep}
