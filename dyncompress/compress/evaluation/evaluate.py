"""What a model does on data: accuracy, perplexity, MACs, who answered and wall-clock time, static and dynamic alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import RequestError
from ...passes.graph.cost import count_macs
from ...passes.graph.meta import is_captured
from ...runtime.predict.dynamic import DynamicModel
from ..training.batches import LabelledData, call, device_of_model, in_order, placed, size_of
from ..training.losses import IGNORED, check_labels, logits_of


@dataclass(frozen=True)
class ExitUse:
    """One exit on a data set.

    at: the graph node it follows; "output" for the final one. macs: of a sample that leaves there, the mean with gates.
    share: of the samples that it answered, 0..1. accuracy: on those, 0..1. None: there are none.
    """

    at: str
    macs: int
    share: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Evaluation:
    """What a model reached on a data set.

    accuracy: 0..1, over samples, or over all positions where every sample has several. mean_macs: per sample, None for
    a module that was not captured. exits: none in a static model. perplexity: exp of the mean cross-entropy over all
    positions; None where the labels are per sample. What is labelled -100 counts for nothing.
    """

    samples: int
    accuracy: float
    mean_macs: float | None
    exits: tuple[ExitUse, ...] = ()
    perplexity: float | None = None


def evaluate(
    model: nn.Module, data: LabelledData, batch_size: int = 256, device: torch.device | str | None = None
) -> Evaluation:
    """Runs the whole data set through a dynamic model's `predict`, or through a static model's forward.

    Args:
        data: map-style, of (inputs, int label) or of (inputs, labels (T,)) for logits per position.
        device: None = where the model is; it returns there.

    Raises:
        RequestError: no data, or an output without (B, classes) or (B, T, classes) logits that fit the labels.
    """
    size_of(data, "evaluation")
    sums: list[Tensor] = []
    used: list[Tensor] = []
    with ready(model, device) as where:
        for inputs, labels in in_order(data, batch_size, where):
            if isinstance(model, DynamicModel):
                out = call(model.predict, inputs)
                used.append(torch.stack((out.exit_index.cpu(), out.macs.cpu()), dim=1).double())
                sums.append(position_sums(out.logits, labels).cpu())
            else:
                sums.append(position_sums(logits_of(call(model, inputs)), labels).cpu())
    right, counted, loss = torch.cat(sums).unbind(1)
    total = counted.sum()
    if not total:
        raise RequestError(f"every label of the evaluation data is {IGNORED}, which counts for nothing")
    exits: tuple[ExitUse, ...] = ()
    macs = float(count_macs(model)) if is_captured(model) else None
    if isinstance(model, DynamicModel):
        exits = _exit_uses(model, torch.cat(used), right, counted)
        macs = float(torch.cat(used)[:, 1].mean())
    perplexity = float((loss.sum() / total).exp()) if labels.dim() > 1 else None
    return Evaluation(len(right), float(right.sum() / total), macs, exits, perplexity)


def position_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Per sample (B, 3) float64: right answers, labels that count and, for labels per position, their cross-entropy."""
    if labels.dim() > 1 or logits.dim() > 2:
        check_labels(labels, logits)
    counted = labels != IGNORED
    right = (logits.argmax(-1) == labels) & counted
    loss = torch.zeros_like(labels, dtype=torch.float64)
    if labels.dim() > 1:
        loss[counted] = F.cross_entropy(logits[counted].float(), labels[counted], reduction="none").double()
    return torch.stack([column.double().view(len(labels), -1).sum(1) for column in (right, counted, loss)], dim=1)


def _exit_uses(model: DynamicModel, used: Tensor, right: Tensor, counted: Tensor) -> tuple[ExitUse, ...]:
    """used: (N, 2), the exit and the MACs of every sample."""
    index, macs = used.unbind(1)
    uses = []
    for k, (at, cost) in enumerate(zip([*model.exits, "output"], model.exit_macs, strict=True)):
        here = index == k
        positions = float(counted[here].sum())
        uses.append(
            ExitUse(
                at=at,
                macs=round(float(macs[here].mean())) if bool(here.any()) else cost,  # heads that are off cost nothing
                share=float(here.double().mean()),
                accuracy=float(right[here].sum()) / positions if positions else None,
            )
        )
    return tuple(uses)


def collect_logits(
    model: nn.Module, data: LabelledData, batch_size: int = 256, device: torch.device | str | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Every exit's logits (N, classes) over the whole data set - one only for a static model - and the labels (N,).

    They lie on the CPU. See `evaluate` for arguments and errors.
    """
    size_of(data, "evaluation")
    parts: list[tuple[Tensor, ...]] = []
    all_labels: list[Tensor] = []
    with ready(model, device) as where:
        for inputs, labels in in_order(data, batch_size, where):
            if isinstance(model, DynamicModel):
                logits = call(model.all_logits, inputs)
            else:
                logits = (logits_of(call(model, inputs)),)
            parts.append(tuple(z.float().cpu() for z in logits))
            all_labels.append(labels.cpu())
    return tuple(torch.cat(column) for column in zip(*parts, strict=True)), torch.cat(all_labels)


@contextmanager
def ready(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """The model in eval mode on the device, no gradients taken; everything as it was afterwards."""
    where = torch.device(device) if device is not None else device_of_model(model)
    with placed(model, where), torch.no_grad():
        model.eval()
        yield where
