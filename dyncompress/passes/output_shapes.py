"""Output shapes of the commonest operators, a line each; torch's own shape functions take up to a millisecond a call.

None where the plain case (floating-point tensors without gaps or repeats in memory) does not apply: torch then answers
itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Shape = Callable[..., Tensor | None]


def _dense(x: Tensor) -> bool:
    """Floating-point, its elements in any order exactly those of its memory."""
    return x.is_floating_point() and x.untyped_storage().nbytes() == x.numel() * x.element_size()


def _new(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _in_order(x: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return _new(x, x.shape) if _dense(x) else None


def _like(x: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if _dense(x) else None


def _itself(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _pointwise(x: Tensor, y: Any, **__: Any) -> Tensor | None:
    if not isinstance(y, Tensor):
        return _like(x) if isinstance(y, int | float) else None
    if x.dtype != y.dtype or not _dense(y):
        return None
    if x.shape == y.shape:
        return _like(x) if x.stride() == y.stride() else None
    whole = x.is_contiguous() and y.is_contiguous() and x.dim() >= y.dim()
    fits = all(m in (1, n) for n, m in zip(reversed(x.shape), reversed(y.shape), strict=False))
    return _like(x) if whole and fits else None


def _linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor | None:
    if not _dense(x) or not x.is_contiguous() or x.shape[-1] != weight.shape[-1] or x.dtype != weight.dtype:
        return None
    return _new(x, (*x.shape[:-1], weight.shape[0]))


def _conv2d(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor | None:
    if x.dim() != 4 or x.dtype != weight.dtype or x.shape[1] != weight.shape[1] * groups:
        return None
    if not (_dense(x) and x.is_contiguous() and weight.is_contiguous()):
        return None
    s, p, d = _pair(stride), _pair(padding), _pair(dilation)
    sides = [(x.shape[i + 2] + 2 * p[i] - d[i] * (weight.shape[i + 2] - 1) - 1) // s[i] + 1 for i in range(2)]
    return _new(x, (x.shape[0], weight.shape[0], *sides)) if min(sides) > 0 else None


def _pair(value: Any) -> Sequence[int]:
    both = [value] if isinstance(value, int) else list(value)
    return both * 2 if len(both) == 1 else both


_SAME = (
    "batch_norm", "dropout", "relu", "gelu", "silu", "hardtanh", "hardswish", "relu6", "hardsigmoid", "sigmoid", "tanh"
)  # fmt: skip
_IN_PLACE = ("relu_", "silu_", "hardtanh_", "hardswish_", "relu6_")

OUTPUT_SHAPES: dict[Any, Shape] = {
    aten.conv2d.default: _conv2d,
    aten.linear.default: _linear,
    **dict.fromkeys((aten.softmax.int, aten.layer_norm.default, aten.group_norm.default), _in_order),
    **{getattr(aten, name).default: _like for name in _SAME},
    **{getattr(aten, name).default: _itself for name in _IN_PLACE},
    **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor), _pointwise),
}
