"""Norms that divide by the count they were trained with, after some of what they average over was removed.

With n the old count, x the values left and r the removed ones, which are constant (zero, as a rule):
    mean = (sum(x) + sum(r)) / n
    var = (sum((x - mean)^2) + sum(r^2) - 2 * mean * sum(r) + (n - len(x)) * mean^2) / n
    rms^2 = (sum(x^2) + sum(r^2)) / n
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


class _CountedNorm(nn.Module):
    """`count`: how many values each mean ran over before shrinking. `rest`: shape of `rest_sum` and `rest_squares`, the
    sums of r and r^2 over the last dim, where r is not zero."""

    rest_sum: Tensor | None
    rest_squares: Tensor | None

    def __init__(
        self,
        shape: list[int],
        count: int,
        eps: float | None,
        weight: bool,
        bias: bool,
        rest: list[int] | None = None,
    ) -> None:
        super().__init__()
        for name in ("rest_sum", "rest_squares"):
            self.register_buffer(name, None if rest is None else torch.zeros(rest))
        self.normalized_shape, self.count, self.eps = tuple(shape), count, eps
        self.weight = nn.Parameter(torch.ones(shape)) if weight else None
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def spec(self) -> dict[str, Any]:
        """Constructor arguments as plain JSON."""
        args: dict[str, Any] = {"shape": list(self.normalized_shape), "count": self.count, "eps": self.eps}
        if self.rest_sum is not None:
            args["rest"] = list(self.rest_sum.shape)
        return {"type": type(self).__name__, "args": args | self._flags()}

    def _flags(self) -> dict[str, Any]:
        return {"weight": self.weight is not None, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        """Shape, count and eps."""
        return f"{self.normalized_shape}, count={self.count}, eps={self.eps}"

    def _standardised(self, x: Tensor, dims: tuple[int, ...], count: int) -> Tensor:
        left = math.prod(x.shape[d] for d in dims)
        total = x.sum(dims, keepdim=True)
        mean = (total if self.rest_sum is None else total + self.rest_sum) / count
        squares = (x - mean).square().sum(dims, keepdim=True) + (count - left) * mean.square()
        if self.rest_sum is not None and self.rest_squares is not None:
            squares = squares + self.rest_squares - 2 * mean * self.rest_sum
        return (x - mean) * torch.rsqrt(squares / count + (self.eps or 0.0))

    def _affine(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.weight is not None:
            x = x * self.weight.view(shape)
        return x if self.bias is None else x + self.bias.view(shape)


class CountedLayerNorm(_CountedNorm):
    """nn.LayerNorm over the last dims, dividing by `count`."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., *shape)."""
        dims = tuple(range(-len(self.normalized_shape), 0))
        return self._affine(self._standardised(x, dims, self.count), self.normalized_shape)


class CountedRMSNorm(_CountedNorm):
    """nn.RMSNorm over the last dims, dividing by `count`."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., *shape)."""
        dims = tuple(range(-len(self.normalized_shape), 0))
        squares = x.square().sum(dims, keepdim=True)
        squares = squares if self.rest_squares is None else squares + self.rest_squares
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return self._affine(x * torch.rsqrt(squares / self.count + eps), self.normalized_shape)


class CountedGroupNorm(_CountedNorm):
    """nn.GroupNorm with `num_groups` groups of once `count` channels each."""

    def __init__(
        self, shape: list[int], count: int, eps: float | None, weight: bool, bias: bool, num_groups: int
    ) -> None:
        super().__init__(shape, count, eps, weight, bias)
        self.num_groups = num_groups

    def _flags(self) -> dict[str, Any]:
        return {**super()._flags(), "num_groups": self.num_groups}

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, ...)."""
        area = math.prod(x.shape[2:])
        grouped = x.reshape(x.shape[0], self.num_groups, -1)
        normed = self._standardised(grouped, (2,), self.count * area).reshape(x.shape)
        return self._affine(normed, (-1, *[1] * (x.dim() - 2)))
