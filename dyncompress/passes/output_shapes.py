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


def _packed(x: Tensor) -> bool:
    """Its elements are, in any order, exactly those of its memory."""
    return x.untyped_storage().nbytes() == x.numel() * x.element_size()


def _dense(x: Tensor) -> bool:
    return x.is_floating_point() and _packed(x)


def _new(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _in_order(x: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return _new(x, x.shape) if _dense(x) else None


def _like(x: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if _dense(x) else None


def _itself(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _pointwise(x: Tensor, y: Any, **__: Any) -> Tensor | None:
    return _joined(x, y, x.dtype)


def _comparison(x: Tensor, y: Any) -> Tensor | None:
    return _joined(x, y, torch.bool)


def _floating(x: Tensor, y: Any, **__: Any) -> Tensor | None:
    return _joined(x, y, x.dtype) if x.is_floating_point() else None


def _joined(x: Tensor, y: Any, dtype: torch.dtype) -> Tensor | None:
    """An operand of the result's shape that comes first decides the order in memory; one that comes second, only if the
    first has no other order."""
    wide = x
    if isinstance(y, Tensor):
        wide, narrow = (x, y) if (x.dim(), x.numel()) >= (y.dim(), y.numel()) else (y, x)
        fits = all(m in (1, n) for n, m in zip(reversed(wide.shape), reversed(narrow.shape), strict=False))
        if not fits or x.dtype != y.dtype or not _packed(narrow):
            return None
        if wide is y and sum(n > 1 for n in x.shape) > 1 and not (x.is_contiguous() and y.is_contiguous()):
            return None
    elif x.dtype is torch.bool or not isinstance(y, int if not x.is_floating_point() else int | float):
        return None
    return torch.empty_strided(wide.shape, wide.stride(), dtype=dtype, device="meta") if _packed(wide) else None


def _in_place(x: Tensor, y: Any, **__: Any) -> Tensor | None:
    if isinstance(y, Tensor):
        return x if x.dtype == y.dtype and x.shape == y.shape else None
    return x if x.is_floating_point() and isinstance(y, int | float) else None


def _arange(end: Any, *, dtype: torch.dtype | None = None, **__: Any) -> Tensor | None:
    return torch.empty(end, dtype=dtype or torch.int64, device="meta") if type(end) is int else None


def _contiguous(x: Tensor, **options: Any) -> Tensor | None:
    return x if not options and x.is_contiguous() else None


def _mean(x: Tensor, dim: Any, keepdim: bool = False, **__: Any) -> Tensor | None:
    if not dim or not x.is_contiguous() or not _dense(x):
        return None
    gone = {range(x.dim())[d] for d in dim}
    return _new(x, [1 if d in gone else n for d, n in enumerate(x.shape) if keepdim or d not in gone])


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    if not all(_dense(x) and x.is_contiguous() and x.dtype == first.dtype for x in tensors):
        return None
    at = range(first.dim())[dim]
    if any(x.dim() != first.dim() or _without(x, at) != _without(first, at) for x in tensors):
        return None
    return _new(first, (*first.shape[:at], sum(x.shape[at] for x in tensors), *first.shape[at + 1 :]))


def _without(x: Tensor, dim: int) -> tuple[int, ...]:
    return (*x.shape[:dim], *x.shape[dim + 1 :])


def _embedding(weight: Tensor, ids: Tensor, *_: Any) -> Tensor | None:
    if weight.dim() != 2 or ids.is_floating_point():
        return None
    return _new(weight, (*ids.shape, weight.shape[1]))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *_: Any, **options: Any) -> Tensor | None:
    if q.dim() != 4 or not q.dtype == k.dtype == v.dtype or options.get("enable_gqa") or not _dense(v):
        return None
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        return None
    scores = (*q.shape[:3], k.shape[2])
    fits = mask is None or all(m in (1, n) for n, m in zip(reversed(scores), reversed(mask.shape), strict=False))
    return _new(q, (*q.shape[:3], v.shape[-1])) if fits else None


def _linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor | None:
    if x.shape[-1] != weight.shape[-1] or x.dtype != weight.dtype:
        return None
    if x.dim() != 2 and not (_dense(x) and x.is_contiguous()):
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


def _max_pool2d(
    x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor | None:
    if ceil_mode or x.dim() != 4 or not x.is_contiguous() or not _dense(x):
        return None
    k, p, d = _pair(kernel), _pair(padding), _pair(dilation)
    s = _pair(stride) if stride else k
    sides = [(x.shape[i + 2] + 2 * p[i] - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i in range(2)]
    return _new(x, (*x.shape[:2], *sides)) if min(sides) > 0 and all(2 * p[i] <= k[i] for i in range(2)) else None


def _avg_pool2d(x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False, *_: Any) -> Any:
    return _max_pool2d(x, kernel, stride, padding, 1, ceil_mode)


def _adaptive_pool2d(x: Tensor, size: Sequence[int]) -> Tensor | None:
    return _new(x, (*x.shape[:2], *size)) if x.dim() == 4 and x.is_contiguous() and _dense(x) else None


def _pair(value: Any) -> Sequence[int]:
    both = [value] if isinstance(value, int) else list(value)
    return both * 2 if len(both) == 1 else both


_SAME = (
    "batch_norm", "dropout", "relu", "gelu", "silu", "hardtanh", "hardswish", "relu6", "hardsigmoid", "sigmoid", "tanh",
    "rsqrt",
)  # fmt: skip
_IN_PLACE = ("relu_", "silu_", "hardtanh_", "hardswish_", "relu6_")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")

OUTPUT_SHAPES: dict[Any, Shape] = {
    aten.conv2d.default: _conv2d,
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    aten.scaled_dot_product_attention.default: _attention,
    aten.mean.dim: _mean,
    aten.cat.default: _cat,
    aten.max_pool2d.default: _max_pool2d,
    aten.avg_pool2d.default: _avg_pool2d,
    aten.adaptive_avg_pool2d.default: _adaptive_pool2d,
    **dict.fromkeys((aten.softmax.int, aten.layer_norm.default, aten.group_norm.default), _in_order),
    **{getattr(aten, name).default: _like for name in _SAME},
    **{getattr(aten, name).default: _itself for name in _IN_PLACE},
    **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.__and__.Tensor), _pointwise),
    **dict.fromkeys((aten.div.Tensor, aten.pow.Tensor_Scalar), _floating),
    **{getattr(getattr(aten, name), kind): _comparison for name in _COMPARISONS for kind in ("Scalar", "Tensor")},
    **dict.fromkeys((aten.add_.Tensor, aten.mul_.Tensor), _in_place),
    aten.arange.default: _arange,
    aten.contiguous.default: _contiguous,
}
