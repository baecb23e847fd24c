"""Output shapes of the commonest operators, a line each; torch's own shape functions take up to a millisecond a call.

None where the plain case (contiguous floating-point tensors) does not apply: torch then answers itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Shape = Callable[..., Tensor | None]


def _like(x: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return _empty(x, x.shape) if _plain(x) else None


def _plain(x: Tensor) -> bool:
    return x.is_floating_point() and x.is_contiguous()


def _empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _itself(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _pointwise(x: Tensor, y: Any, **__: Any) -> Tensor | None:
    same = isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype
    return _empty(x, x.shape) if same and _plain(x) and _plain(y) else None


def _linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor | None:
    if not _plain(x) or x.dim() < 1 or x.shape[-1] != weight.shape[-1] or x.dtype != weight.dtype:
        return None
    return _empty(x, (*x.shape[:-1], weight.shape[0]))


def _conv2d(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor | None:
    if not (_plain(x) and _plain(weight)) or x.dim() != 4 or x.shape[1] != weight.shape[1] * groups:
        return None
    s, p, d = _pair(stride), _pair(padding), _pair(dilation)
    sides = [(x.shape[i + 2] + 2 * p[i] - d[i] * (weight.shape[i + 2] - 1) - 1) // s[i] + 1 for i in range(2)]
    return _empty(x, (x.shape[0], weight.shape[0], *sides)) if min(sides) > 0 else None


def _pair(value: Any) -> Sequence[int]:
    both = [value] if isinstance(value, int) else list(value)
    return both * 2 if len(both) == 1 else both


OUTPUT_SHAPES: dict[Any, Shape] = {
    aten.conv2d.default: _conv2d,
    aten.linear.default: _linear,
    **dict.fromkeys(
        (aten.batch_norm.default, aten.layer_norm.default, aten.group_norm.default, aten.dropout.default), _like
    ),
    **dict.fromkeys(
        (aten.relu.default, aten.gelu.default, aten.silu.default, aten.hardtanh.default, aten.hardswish.default), _like
    ),
    **dict.fromkeys((aten.sigmoid.default, aten.hardsigmoid.default, aten.tanh.default, aten.softmax.int), _like),
    **dict.fromkeys(
        (aten.relu_.default, aten.silu_.default, aten.hardtanh_.default, aten.hardswish_.default, aten.relu6_.default),
        _itself,
    ),
    **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor), _pointwise),
}
