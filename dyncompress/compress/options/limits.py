"""How far the axes of a model may shrink."""

import math
from dataclasses import dataclass

from ...errors import RequestError

_FINE, _WIDE = 24, 128  # from these sizes on, hardware likes multiples of 8 and of 16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What of a model may go.

    Raises:
        RequestError: shares that are not within 0..1, or a floor above the ceiling.
    """

    floor: float = 0.1
    """Least share of every axis that stays."""
    ceiling: float = 1.0
    """Largest share of every axis that stays."""
    round_to: int | None = None
    """Keep a multiple of this many indices of every axis; by default 1, with latency 8 or 16 where an axis is wide."""
    ignore: tuple[str, ...] = ()
    """Modules or parameters whose axes stay whole, by name."""
    depth: bool = False
    """Whole residual branches may go as well."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignore", (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore))
        if not 0 <= self.floor <= 1:
            raise RequestError(f"floor is a share of each axis, between 0 and 1; got {self.floor}")
        if not self.floor <= self.ceiling <= 1:
            raise RequestError(f"ceiling is a share of each axis, between floor and 1; got {self.ceiling}")
        if self.round_to is not None and self.round_to < 1:
            raise RequestError(f"round_to must be at least 1; got {self.round_to}")

    def step(self, size: int) -> int:
        """What counts of an axis of `size` are multiples of."""
        if self.round_to is not None:
            return self.round_to
        return 16 if size >= _WIDE else 8 if size >= _FINE else 1

    def least(self, size: int) -> int:
        """The smallest allowed count of an axis of `size`."""
        return self.rounded(max(1, math.ceil(size * self.floor)), size)

    def most(self, size: int) -> int:
        """The largest allowed count of an axis of `size`."""
        return max(self.least(size), self.rounded(math.ceil(size * self.ceiling), size))

    def rounded(self, count: int, size: int) -> int:
        """`count` up to the next multiple, at most `size`."""
        step = self.step(size)
        return min(size, -(-count // step) * step)
