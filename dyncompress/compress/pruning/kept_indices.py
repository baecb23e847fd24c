"""Which indices of the original model are left after any number of cuts, followed through the tensors they sit in."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...passes.axes.axes import Axes, Axis
from ...passes.axes.axis_kinds import BRANCH
from ...passes.shrink.plan import Plan


@dataclass(frozen=True)
class KeptAxis:
    """An axis of the original: its kind and size, and which of its indices are kept."""

    kind: str
    size: int
    kept: tuple[int, ...]


class Kept:
    """Starts with everything that can shrink in the model; `cut` takes the plan of each cut in turn."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes.prunable
        self._left: dict[str, list[Tensor | None]] = {}  # by tensor and dim: positions in the original, None = all
        self._dropped: set[str] = set()

    def cut(self, plan: Plan) -> None:
        """Follows one cut of the model as it was left by those before."""
        self._dropped |= plan.dropped
        for name, dims in plan.kept.items():
            before = self._left.get(name, [None] * len(dims))
            self._left[name] = [_composed(old, new) for old, new in zip(before, dims, strict=True)]

    def table(self) -> dict[str, KeptAxis]:
        """By axis name of the original, in its order."""
        return {axis.name: KeptAxis(axis.kind, axis.size, tuple(self._of(axis))) for axis in self._axes}

    def _of(self, axis: Axis) -> list[int]:
        piece = next((s for s in axis.slices if s.tensor not in self._dropped), None)
        if piece is None:
            return []
        left = self._left[piece.tensor][piece.dim] if piece.tensor in self._left else None
        if axis.kind == BRANCH or left is None:
            return list(range(axis.size))
        return torch.isin(piece.positions, left).any(1).nonzero()[:, 0].tolist()


def _composed(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old[new]
