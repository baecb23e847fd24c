"""What every exit answers where a model answers at every position: accuracy and perplexity, exit by exit."""

from dataclasses import dataclass

import torch

from ...runtime.predict.dynamic import DynamicModel
from ..training.batches import LabelledData, call, in_order
from .evaluate import position_sums, ready


@dataclass(frozen=True, kw_only=True)
class ExitQuality:
    """An exit, the model's own last ("output") included: the node it follows, MACs up to there, accuracy (0..1) and
    perplexity over all positions."""

    at: str
    macs: int
    accuracy: float
    perplexity: float


def measure_exits(
    dynamic: DynamicModel, data: LabelledData, batch_size: int = 64, device: torch.device | str | None = None
) -> tuple[ExitQuality, ...]:
    """What each exit answers by itself.

    Args:
        data: map-style, of (inputs, int labels (T,)); what is labelled -100 counts for nothing.
    """
    sums = torch.zeros(len(dynamic.exits) + 1, 3, dtype=torch.float64)
    with ready(dynamic, device) as where:
        for inputs, labels in in_order(data, batch_size, where):
            for k, logits in enumerate(call(dynamic.all_logits, inputs)):
                sums[k] += position_sums(logits, labels).sum(0).cpu()
    right, counted, loss = sums.unbind(1)
    columns = zip([*dynamic.exits, "output"], dynamic.exit_macs, right / counted, (loss / counted).exp(), strict=True)
    return tuple(ExitQuality(at=at, macs=macs, accuracy=float(a), perplexity=float(p)) for at, macs, a, p in columns)
