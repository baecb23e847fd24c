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


def _ordered(x: Tensor) -> bool:
    """Later dims are closer together in memory; there may be gaps."""
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    return 0 not in strides and strides == sorted(strides, reverse=True)


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
    if isinstance(y, Tensor):
        if x.dtype != y.dtype:
            return None
        shape = _broadcast(x.shape, y.shape) if _ordered(x) and _ordered(y) else None
    elif x.dtype is torch.bool or not isinstance(y, int if not x.is_floating_point() else int | float):
        return None
    else:
        shape = list(x.shape) if _ordered(x) else None
    return _in_order_of_one(x, y, dtype) if shape is None else torch.empty(shape, dtype=dtype, device="meta")


def _broadcast(*shapes: Sequence[int]) -> list[int] | None:
    """The shape that all of them are repeated to."""
    rank = max(map(len, shapes))
    sizes = [{1, *dims} - {1} for dims in zip(*([1] * (rank - len(s)) + [*s] for s in shapes), strict=True)]
    return None if any(len(size) > 1 for size in sizes) else [next(iter(size), 1) for size in sizes]


def _in_order_of_one(x: Tensor, y: Any, dtype: torch.dtype) -> Tensor | None:
    """An operand of the result's shape that comes first decides the order in memory; one that comes second, only if the
    first has no other order."""
    wide = x
    if isinstance(y, Tensor):
        wide, narrow = (x, y) if (x.dim(), x.numel()) >= (y.dim(), y.numel()) else (y, x)
        fits = all(m in (1, n) for n, m in zip(reversed(wide.shape), reversed(narrow.shape), strict=False))
        if not fits or not _packed(narrow):
            return None
        if wide is y and sum(n > 1 for n in x.shape) > 1 and not (x.is_contiguous() and y.is_contiguous()):
            return None
    return torch.empty_strided(wide.shape, wide.stride(), dtype=dtype, device="meta") if _packed(wide) else None


def _in_place(x: Tensor, y: Any, **__: Any) -> Tensor | None:
    if isinstance(y, Tensor):
        return x if x.dtype == y.dtype and x.shape == y.shape else None
    return x if x.is_floating_point() and isinstance(y, int | float) else None


def _arange(end: Any, *, dtype: torch.dtype | None = None, **__: Any) -> Tensor | None:
    return torch.empty(end, dtype=dtype or torch.int64, device="meta") if type(end) is int else None


def _contiguous(x: Tensor, **options: Any) -> Tensor | None:
    if options:
        return None
    return x if x.is_contiguous() else _new(x, x.shape)


def _like_any(x: Tensor) -> Tensor | None:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if _packed(x) else None


def _cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or (x.dtype if x.is_floating_point() else torch.int64), device="meta")


def _diff(x: Tensor, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Tensor | None:
    if n != 1 or x.dtype is torch.bool or not all(_ordered(t) for t in (x, prepend, append) if t is not None):
        return None
    at = range(x.dim())[dim]
    longer = sum(t.shape[at] for t in (x, prepend, append) if t is not None)
    return _new(x, (*x.shape[:at], longer - 1, *x.shape[at + 1 :])) if longer else None


def _where(condition: Tensor, x: Tensor, y: Any) -> Tensor | None:
    tensors = [t for t in (condition, x, y) if isinstance(t, Tensor)]
    same = x.dtype == y.dtype if isinstance(y, Tensor) else _joined(x, y, x.dtype) is not None
    shape = _broadcast(*(t.shape for t in tensors)) if same and all(t.is_contiguous() for t in tensors) else None
    return None if shape is None else _new(x, shape)


def _gather(x: Tensor, dim: int, index: Tensor) -> Tensor | None:
    return _new(x, index.shape) if index.is_contiguous() and x.dim() == index.dim() else None


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor | None:
    """Whole numbers for the first dims; torch also takes masks, and dims in between."""
    if any(i is None or i.dtype != torch.int64 or not i.is_contiguous() for i in indices) or not x.is_contiguous():
        return None
    shape = _broadcast(*(i.shape for i in indices if i is not None))
    return None if shape is None else _new(x, (*shape, *x.shape[len(indices) :]))


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


def _conv(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor | None:
    if x.dim() != weight.dim() or x.dtype != weight.dtype or x.shape[1] != weight.shape[1] * groups:
        return None
    if not (_dense(x) and x.is_contiguous() and weight.is_contiguous()):
        return None
    n = x.dim() - 2
    s, p, d = _each(stride, n), _each(padding, n), _each(dilation, n)
    sides = [(x.shape[i + 2] + 2 * p[i] - d[i] * (weight.shape[i + 2] - 1) - 1) // s[i] + 1 for i in range(n)]
    return _new(x, (x.shape[0], weight.shape[0], *sides)) if min(sides) > 0 else None


def _max_pool2d(
    x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor | None:
    if ceil_mode or x.dim() != 4 or not x.is_contiguous() or not _dense(x):
        return None
    k, p, d = _each(kernel), _each(padding), _each(dilation)
    s = _each(stride) if stride else k
    sides = [(x.shape[i + 2] + 2 * p[i] - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i in range(2)]
    return _new(x, (*x.shape[:2], *sides)) if min(sides) > 0 and all(2 * p[i] <= k[i] for i in range(2)) else None


def _avg_pool2d(x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False, *_: Any) -> Any:
    return _max_pool2d(x, kernel, stride, padding, 1, ceil_mode)


def _adaptive_pool2d(x: Tensor, size: Sequence[int]) -> Tensor | None:
    return _new(x, (*x.shape[:2], *size)) if x.dim() == 4 and x.is_contiguous() and _dense(x) else None


def _each(value: Any, dims: int = 2) -> Sequence[int]:
    each = [value] if isinstance(value, int) else list(value)
    return each * dims if len(each) == 1 else each


_SAME = (
    "batch_norm", "dropout", "relu", "gelu", "silu", "hardtanh", "hardswish", "relu6", "hardsigmoid", "sigmoid", "tanh",
    "rsqrt", "log",
)  # fmt: skip
_IN_PLACE = ("relu_", "silu_", "hardtanh_", "hardswish_", "relu6_")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")

OUTPUT_SHAPES: dict[Any, Shape] = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default), _conv),
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
    **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor), _pointwise),
    **dict.fromkeys((aten.__and__.Tensor, aten.min.other), _pointwise),
    **dict.fromkeys((aten.abs.default, aten.neg.default), _like_any),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther), _where),
    aten.cumsum.default: _cumsum,
    aten.gather.default: _gather,
    aten.diff.default: _diff,
    aten.index.Tensor: _index,
    **dict.fromkeys((aten.div.Tensor, aten.pow.Tensor_Scalar), _floating),
    **{getattr(getattr(aten, name), kind): _comparison for name in _COMPARISONS for kind in ("Scalar", "Tensor")},
    **dict.fromkeys((aten.add_.Tensor, aten.mul_.Tensor), _in_place),
    aten.arange.default: _arange,
    aten.contiguous.default: _contiguous,
}
