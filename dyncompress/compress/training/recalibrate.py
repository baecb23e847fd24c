"""BatchNorm statistics measured anew, for weights that have changed since they were collected.

The running mean and variance become the plain average over the batches seen (momentum None), as super-network methods
do after training (Yu & Huang, ICCV 2019, section 3.3).
"""

from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Subset

from .batches import LabelledData, call, device_of_model, in_order, placed, size_of

RECALIBRATION_BATCHES = 32  # of a model that was cut


@torch.no_grad()
def recalibrate_batchnorm(
    model: nn.Module,
    data: LabelledData,
    batches: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> None:
    """Re-estimates the running statistics of every BatchNorm in place; everything else is in eval mode meanwhile.

    Args:
        data: map-style, of (inputs, label); the labels are not used.
        batches: how many, of samples drawn at random; None = all samples once.
        device: None = where the model is; it returns there.

    Raises:
        RequestError: no data.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    count = size_of(data, "recalibration")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    whole = order[: count // batch_size * batch_size] if count >= batch_size else order
    momenta: list[Any] = [norm.momentum for norm in norms]
    where = torch.device(device) if device is not None else device_of_model(model)
    with placed(model, where):
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for inputs, _ in islice(in_order(Subset(data, whole.tolist()), batch_size, where), batches):
            call(model, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
