"""Structured pruning beside its baselines, low-rank layers and unstructured zeros, at the same share of parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ...errors import RequestError
from ...passes.capture.capture import capture
from ...passes.graph.cost import count_parameters
from ..evaluation.report_entries import StaticEntry, measure
from ..options.steps import Compare
from ..options.training_options import Run, Training
from ..training.batches import LabelledData, device_of_model, examples_of
from .after_cut import check_finetune, train_after_cut
from .baselines import low_rank, prune_weights
from .prune import prune
from .unstructured import HoldZeros, SparseLinear, as_sparse, weights_of

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
    shares: Sequence[float] = Compare.shares,
    finetune: int = Compare.finetune,
    training: Training = Compare.training,
    run: Run = Run(),
) -> Comparison:
    """Prunes structure, cuts ranks and zeroes single weights, each to the same shares of the parameters, and measures.

    All are trained alike: BatchNorm statistics anew, then `finetune` epochs. Unstructured zeros are held, and count as
    parameters and MACs with dense kernels, which store and multiply them, but not with sparse ones (`as_sparse`).

    Args:
        model: any model `capture` takes, trained; measured as it is too.
        train, test: map-style, of (inputs, label); what is trained on, and what is judged and timed on.
        shares: of the parameters that stay, or of those that are not zero; each in (0, 1).
        The other options are those of `options.steps.Compare`.

    Raises:
        RequestError: a share out of range, data missing or unfit, or no method reaches any share.
        DynCompressError: the training failed.
    """
    if not shares or not all(0 < share < 1 for share in shares):
        raise RequestError(f"shares are the parts of the parameters that stay, each above 0 and below 1; got {shares}")
    check_finetune(finetune, train)
    asked = Compare(shares=tuple(shares), finetune=finetune, training=training)
    examples = examples_of(train)
    gm = capture(model, examples)
    models, kinds, left_out = {"static": gm}, {"static": ("static", 1.0)}, dict[str, str]()
    for name, (method, share) in _jobs(shares).items():
        try:
            small = _METHODS[method](gm, share)
        except RequestError as reason:
            left_out[name] = str(reason)
            continue
        hooks = [HoldZeros(small)] if method == UNSTRUCTURED else []
        train_after_cut(small, train, finetune, asked.training, run.part(name), hooks=hooks)
        models[name], kinds[name] = small, (method, share)
    if len(models) == 1:
        raise RequestError(f"no method reaches any share: {next(iter(left_out.values()))}")
    where = torch.device(run.device) if run.device is not None else device_of_model(gm)
    return Comparison(models, _entries(models, kinds, examples, test, where), left_out)


def _jobs(shares: Sequence[float]) -> dict[str, tuple[str, float]]:
    return {f"{method}-{share}": (method, share) for share in shares for method in _METHODS}


def _unstructured(gm: fx.GraphModule, share: float) -> fx.GraphModule:
    """Zeros among the weights, as many as make up the share of all parameters."""
    whole, weights = count_parameters(gm), sum(weight.numel() for weight in weights_of(gm).values())
    zeros = (1 - share) * whole
    if zeros > weights:
        raise RequestError(f"params={share} is out of reach: only {weights} of {whole} parameters are weights")
    return prune_weights(gm, sparsity=zeros / weights)


_METHODS: dict[str, Callable[[fx.GraphModule, float], fx.GraphModule]] = {
    "structured": lambda gm, share: prune(gm, params=share),
    "low-rank": lambda gm, share: low_rank(gm, params=share),
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
