"""Controls for a learned structure: the same shape with its own earlier weights, or with random ones, trained anew.

`rewind`, trained again, is a lottery ticket (Frankle & Carbin, ICLR 2019, section 2). `reinit`, trained, is its
control, and is the small model from scratch: it shows whether learning the structure from the large one was worth it.
`retrain` is either of them, trained.
"""

from typing import Any

import torch
from torch import fx

from ...errors import RequestError
from ...passes.axes.axes import as_keep, infer_axes
from ...passes.axes.axis_kinds import BRANCH
from ...passes.graph.copying import deep_copy
from ...passes.modules.counted_norms import CountedGroupNorm, CountedLayerNorm, CountedRMSNorm
from ...passes.shrink.plan import Plan, plan_axes
from ..options.steps import Retrain
from ..options.training_options import Run, Training
from ..pruning.kept_indices import KeptAxis
from ..pruning.reports import PruneReport
from ..training.batches import HasSplits, LabelledData, training_part
from ..training.losses import cross_entropy
from ..training.trainer import LossFunction, fit
from .sparsify_report import SparsifyReport


def retrain(
    small: fx.GraphModule,
    data: HasSplits | LabelledData,
    *,
    early: fx.GraphModule | None = None,
    loss_fn: LossFunction = cross_entropy,
    training: Training = Retrain.training,
    run: Run = Run(),
) -> fx.GraphModule:
    """A model of the shape of `small`, trained from the weights of `early`, or from random ones.

    Args:
        small: what `sparsify` or `prune` made; without `early`, any captured model.
        data: map-style, of (inputs, label), labels as `loss_fn` wants them; or an object with such a `train` set.
        early: as for `rewind`; None = `reinit`, with random weights of the run's seed.
        loss_fn: (the model's output, labels) -> scalar.

    Raises:
        RequestError: as `rewind`, or data missing or unfit.
        DynCompressError: the training failed.
    """
    asked = Retrain(training=training)
    gm = reinit(small, run.seed) if early is None else rewind(small, early)
    fit(gm, loss_fn, training_part(data), asked.training, run)
    return gm.eval()


@torch.no_grad()
def rewind(small: fx.GraphModule, early: fx.GraphModule) -> fx.GraphModule:
    """A copy of `small` whose parameters and buffers are the surviving slices of those of `early`.

    Args:
        small: what `sparsify` or `prune` made; its report says which indices are kept.
        early: the captured model that it was made of, with the weights to go back to, such as the initial ones.

    Raises:
        RequestError: `small` carries no report, or `early` is another model.
    """
    result = deep_copy(small)
    found = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    for name, tensor in _plan(small, early)({**dict(early.named_parameters()), **dict(early.named_buffers())}).items():
        if name not in found or found[name].shape != tensor.shape:
            raise RequestError(f"{name} does not fit the smaller model: give the model that it was made of")
        found[name].copy_(tensor)
    return result


@torch.no_grad()
def reinit(small: fx.GraphModule, seed: int = 0) -> fx.GraphModule:
    """A copy of `small` with random weights, as each module initialises itself.

    Parameters of no such module, class tokens and positions, come from a normal distribution with the mean and standard
    deviation that they have in `small`.
    """
    result = deep_copy(small)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in result.modules():
            initialise: Any = getattr(module, "reset_parameters", None)
            if initialise is not None:
                initialise()
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, _COUNTED):
                    parameter.fill_(1.0 if name == "weight" else 0.0)
                else:
                    parameter.normal_(float(parameter.mean()), float(parameter.std(correction=0)))
    return result


_COUNTED = CountedGroupNorm | CountedLayerNorm | CountedRMSNorm


def _plan(small: fx.GraphModule, early: fx.GraphModule) -> Plan:
    axes, found = infer_axes(early), _kept(small)
    kept = {name: list(axis.kept) for name, axis in found.items()}
    missing = sorted(kept.keys() - {axis.name for axis in axes})
    if missing:
        raise RequestError(
            f"the earlier weights are of another model, without {missing[0]}: give the one that was made smaller"
        )
    gone = {name for name, indices in kept.items() if not indices and found[name].kind != BRANCH}
    return plan_axes(axes, as_keep(axes, {name: indices for name, indices in kept.items() if name not in gone}))


def _kept(small: fx.GraphModule) -> dict[str, KeptAxis]:
    if SparsifyReport.is_in(small):
        return SparsifyReport.of(small).kept
    if PruneReport.is_in(small):
        return PruneReport.of(small).kept
    raise RequestError("the smaller model carries no report: it has to come from sparsify or prune")
