"""Structured pruning beside its baselines, low-rank layers and unstructured zeros, at the same share of parameters."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ...errors import RequestError
from ...passes.capture.capture import capture
from ...passes.graph.cost import count_parameters
from ...passes.rewrites.low_rank import LowRank
from ..evaluation.report_entries import StaticEntry, measure
from ..training.batches import LabelledData, device_of_model, examples_of
from ..training.losses import cross_entropy
from ..training.recalibrate import recalibrate_batchnorm
from ..training.trainer import fit
from .prune import RECALIBRATION_BATCHES, prune
from .unstructured import HoldZeros, SparseLinear, as_sparse, prune_weights, weights_of

UNSTRUCTURED = "unstructured"
_INPUTS, _REPEATS = {1: 2}, 50  # by batch size: different batches that are timed; and how often each is


@dataclass(frozen=True, kw_only=True)
class ComparedEntry(StaticEntry):
    """A model, the method that made it ("static": none) and the share of the parameters that stays."""

    method: str
    share: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    models: captured, by name: "static" and METHOD-SHARE, such as "low-rank-0.5".
    entries: of each, and of METHOD-SHARE-sparse where sparse kernels ran; timed one sample a call.
    left_out: why a method could not reach a share, by name.
    """

    models: dict[str, fx.GraphModule]
    entries: dict[str, ComparedEntry]
    left_out: dict[str, str]


def compare(
    model: nn.Module,
    train: LabelledData,
    test: LabelledData,
    *,
    shares: Sequence[float] = (0.5, 0.25),
    finetune: int = 1,
    lr: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Comparison:
    """Prunes structure, cuts ranks and zeroes single weights, each to the same shares of the parameters, and measures.

    All are trained alike: BatchNorm statistics anew, then `finetune` epochs. Unstructured zeros are held, and count as
    parameters and MACs with dense kernels, which store and multiply them, but not with sparse ones (`as_sparse`).

    Args:
        model: any model `capture` takes, trained; measured as it is too.
        train, test: map-style, of (inputs, label); what is trained on, and what is judged and timed on.
        shares: of the parameters that stay, or of those that are not zero; each in (0, 1).
        finetune: epochs, 0 or more; lr, batch_size, device, run_dir, resume: see `trainer.fit`.
        progress: progress bars on standard error.

    Raises:
        RequestError: a share out of range, data missing or unfit, or no method reaches any share.
        DynCompressError: the training failed.
    """
    if not shares or not all(0 < share < 1 for share in shares):
        raise RequestError(f"shares are the parts of the parameters that stay, each above 0 and below 1; got {shares}")
    if finetune < 0:
        raise RequestError(f"finetune is a number of epochs, 0 or more; got {finetune}")
    examples = examples_of(train)
    gm = capture(model, examples)
    models, kinds, left_out = {"static": gm}, {"static": ("static", 1.0)}, dict[str, str]()
    training = {"epochs": finetune, "lr": lr, "batch_size": batch_size, "device": device, "resume": resume}
    for name, (method, share) in _jobs(shares).items():
        try:
            small = _METHODS[method](gm, share)
        except RequestError as reason:
            left_out[name] = str(reason)
            continue
        folder = Path(run_dir) / name if run_dir is not None else None
        _train(small, train, method, seed, {**training, "run_dir": folder, "progress": progress})
        models[name], kinds[name] = small, (method, share)
    if len(models) == 1:
        raise RequestError(f"no method reaches any share: {next(iter(left_out.values()))}")
    where = torch.device(device) if device is not None else device_of_model(gm)
    return Comparison(models, _entries(models, kinds, examples, test, where), left_out)


def _train(small: fx.GraphModule, data: LabelledData, method: str, seed: int, training: dict[str, Any]) -> None:
    recalibrate_batchnorm(small, data, batches=RECALIBRATION_BATCHES, seed=seed)
    if training["epochs"]:
        hooks = [HoldZeros(small)] if method == UNSTRUCTURED else []
        fit(small, cross_entropy, data, hooks=hooks, seed=seed, **training)


def _jobs(shares: Sequence[float]) -> dict[str, tuple[str, float]]:
    return {f"{method}-{share}": (method, share) for share in shares for method in _METHODS}


def _low_rank(gm: fx.GraphModule, share: float) -> fx.GraphModule:
    return LowRank(params=share)(gm).gm


def _structured(gm: fx.GraphModule, share: float) -> fx.GraphModule:
    return prune(gm, params=share)


def _unstructured(gm: fx.GraphModule, share: float) -> fx.GraphModule:
    """Zeros among the weights, as many as make up the share of all parameters."""
    whole, weights = count_parameters(gm), sum(weight.numel() for weight in weights_of(gm).values())
    zeros = (1 - share) * whole
    if zeros > weights:
        raise RequestError(f"params={share} is out of reach: only {weights} of {whole} parameters are weights")
    return prune_weights(gm, zeros / weights)


_METHODS: dict[str, Callable[[fx.GraphModule, float], fx.GraphModule]] = {
    "structured": _structured,
    "low-rank": _low_rank,
    UNSTRUCTURED: _unstructured,
}


def _entries(
    models: dict[str, fx.GraphModule],
    kinds: dict[str, tuple[str, float]],
    examples: Any,
    test: LabelledData,
    device: torch.device,
) -> dict[str, ComparedEntry]:
    """One entry per model, and one more where an unstructured model runs on sparse kernels."""
    every: dict[str, fx.GraphModule] = {}
    known = dict(kinds)
    for name, model in models.items():
        every[name], (method, share) = model, kinds[name]
        sparse = as_sparse(model) if method == UNSTRUCTURED else model
        if any(isinstance(module, SparseLinear) for module in sparse.modules()):
            every[f"{name}-sparse"], known[f"{name}-sparse"] = sparse, (f"{method}, sparse", share)
    found = measure(every, every, examples, test, device, _INPUTS, _REPEATS)
    return {
        name: ComparedEntry(**vars(entry), method=known[name][0], share=known[name][1]) for name, entry in found.items()
    }
