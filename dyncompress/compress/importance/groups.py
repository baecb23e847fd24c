"""Sums over everything that belongs to each index of an axis, and what every importance is given besides the model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.utils.data import Subset

from ...errors import RequestError
from ...passes.axes import Axis
from ...passes.typing import attribute
from ..batches import LabelledData, size_of

PerElement = Callable[[Tensor], Tensor]
Scores = dict[str, Tensor]  # axis name -> one score per index (size,), float64, on the CPU


@dataclass(frozen=True)
class Context:
    """What an importance may use: `samples` of `data` drawn at random with `seed`, in batches of `batch_size`."""

    data: LabelledData | None = None
    samples: int = 512
    batch_size: int = 64
    seed: int = 0
    progress: bool = field(default=False, compare=False)

    def generator(self) -> torch.Generator:
        """A fresh source of random numbers, the same for the same seed."""
        return torch.Generator().manual_seed(self.seed)

    def drawn(self, limit: int | None = None) -> LabelledData:
        """At most `samples` (and `limit`) samples of the data, drawn without repetition.

        Raises:
            RequestError: no data, or none in it.
        """
        if self.data is None:
            raise RequestError("this importance needs data: a dataset of (input, label)")
        order = torch.randperm(size_of(self.data, "importance"), generator=self.generator())
        return Subset(self.data, order[: min(self.samples, limit or self.samples)].tolist())


def group_sums(gm: fx.GraphModule, axis: Axis, per_element: PerElement) -> Tensor:
    """Sum of `per_element(parameter)` over everything that belongs to each index of `axis`: shape (axis.size,)."""
    total = torch.zeros(axis.size, dtype=torch.float64)
    for tensor, dim, positions in parameter_slices(gm, axis):
        values = per_element(tensor).detach().double()
        others = [d for d in range(values.dim()) if d != dim]
        along = values.sum(others) if others else values
        total += along.cpu()[positions].sum(1)
    return total


def parameter_slices(gm: fx.GraphModule, axis: Axis) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
    """Each learned parameter that the axis runs through, with the dim and the positions (axis.size, m) there.

    A parameter that two modules share counts once.
    """
    seen: set[tuple[int, int, int]] = set()
    for piece in axis.slices:
        tensor = attribute(gm, piece.tensor)
        key = (id(tensor), piece.dim, piece.occurrence)
        if isinstance(tensor, nn.Parameter) and key not in seen:
            seen.add(key)
            yield tensor, piece.dim, piece.positions


def normalised(scores: Tensor) -> Tensor:
    """Scores over their mean; all ones where every score is zero."""
    mean = scores.mean()
    return scores / mean if mean > 0 else torch.ones_like(scores)
