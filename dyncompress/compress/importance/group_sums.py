"""Sums over everything that belongs to each index of an axis, and what every importance is given besides the model."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.utils.data import Subset

from ...errors import RequestError
from ...passes.axes.axes import Axis
from ...passes.dims.dims import Dim, resolve
from ...passes.graph.nodes import attribute
from ..training.batches import LabelledData, size_of

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


def group_sums(
    gm: fx.GraphModule, axes: Iterable[Axis], per_element: PerElement, operands: Operands = _weight
) -> Scores:
    """Sum of `per_element(*operands(parameter))` over all that belongs to each index of each axis, by axis name.

    Operands, by default the parameter alone, are shaped like it; a parameter without operands adds nothing.
    """
    sliced = [(axis, list(parameter_slices(gm, axis))) for axis in axes]
    dims: dict[nn.Parameter, set[int]] = {}
    for _, slices in sliced:
        for tensor, dim, _ in slices:
            dims.setdefault(tensor, set()).add(dim)
    along = {
        tensor: _along(per_element, [x.detach() for x in read], wanted)
        for tensor, wanted in dims.items()
        if (read := operands(tensor))
    }
    scores: Scores = {}
    for axis, slices in sliced:
        total = scores[axis.name] = torch.zeros(axis.size, dtype=torch.float64)
        for tensor, dim, positions in slices:
            if tensor in along:
                total += along[tensor][dim][positions].sum(1)
    return scores


def _along(per_element: PerElement, operands: list[Tensor], dims: Iterable[int]) -> dict[int, Tensor]:
    """For each of `dims` the sums over all others, float64 on the CPU.

    In blocks of rows: float64 copies of all rows would not fit a cache.
    """
    first = operands[0]
    rows = max(1, _BLOCK * len(first) // max(first.numel(), 1))
    sums: dict[int, list[Tensor]] = {dim: [] for dim in dims}
    for block in zip(*(x.split(rows) for x in operands), strict=True):
        values = per_element(*(x.double() for x in block))
        for dim, parts in sums.items():
            part = values.sum([d for d in range(values.dim()) if d != dim]) if values.dim() > 1 else values
            if dim and parts:
                parts[0] += part
            else:
                parts.append(part)
    return {dim: torch.cat(parts).cpu() for dim, parts in sums.items()}


def parameter_slices(gm: fx.GraphModule, axis: Axis) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
    """Each learned parameter that the axis runs through, with the dim and the positions (axis.size, m) there.

    A parameter that two modules share counts once.
    """
    seen: set[tuple[int, int, int]] = set()
    places: dict[tuple[Dim | int, int], Tensor] = {}  # most slices of an axis look alike
    for piece in axis.slices:
        tensor = attribute(gm, piece.tensor)
        key = (id(tensor), piece.dim, piece.occurrence)
        if isinstance(tensor, nn.Parameter) and key not in seen:
            seen.add(key)
            kind = piece.dim_type if isinstance(piece.dim_type, int) else resolve(piece.dim_type)
            place = (kind, piece.occurrence)
            if place not in places:
                places[place] = piece.positions
            yield tensor, piece.dim, places[place]


def normalised(scores: Tensor) -> Tensor:
    """Scores over their mean; all ones where every score is zero."""
    mean = scores.mean()
    return scores / mean if mean > 0 else torch.ones_like(scores)
