"""Sums over everything that belongs to each index of an axis, and what every importance is given besides the model."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.utils.data import Subset

from ...errors import RequestError
from ...passes.axes import Axis
from ...passes.typing import attribute
from ..batches import LabelledData, size_of

PerElement = Callable[..., Tensor]
Operands = Callable[[nn.Parameter], tuple[Tensor, ...]]
Scores = dict[str, Tensor]  # axis name -> one score per index (size,), float64, on the CPU

_BLOCK = 1 << 16  # elements


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


def _weight(parameter: nn.Parameter) -> tuple[Tensor, ...]:
    return (parameter,)


def group_sums(gm: fx.GraphModule, axis: Axis, per_element: PerElement, operands: Operands = _weight) -> Tensor:
    """Sum of `per_element(*operands(parameter))` over all that belongs to each index of `axis`: (axis.size,) float64.

    Operands, by default the parameter alone, are shaped like it; a parameter without operands adds nothing.
    """
    total = torch.zeros(axis.size, dtype=torch.float64)
    for tensor, dim, positions in parameter_slices(gm, axis):
        read = operands(tensor)
        if read:
            total += _along(per_element, [x.detach() for x in read], dim).cpu()[positions].sum(1)
    return total


def _along(per_element: PerElement, operands: list[Tensor], dim: int) -> Tensor:
    """Sums over every dim but `dim` in float64, in blocks of rows: float64 copies of all rows would not fit a cache."""
    first = operands[0]
    rows = max(1, _BLOCK * len(first) // max(first.numel(), 1))
    others = [d for d in range(first.dim()) if d != dim]
    sums = (
        values.sum(others) if others else values
        for block in zip(*(x.split(rows) for x in operands), strict=True)
        for values in [per_element(*(x.double() for x in block))]
    )
    return torch.cat(list(sums)) if dim == 0 else functools.reduce(Tensor.add_, sums)


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
