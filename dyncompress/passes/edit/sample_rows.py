"""Some samples of a batch, taken and put back in the memory format that the batch has.

torch gathers and adds rows as if every tensor were contiguous: of a batch in channels last, eight and twenty-five times
as slowly, and what comes out is contiguous. A view in which the dims lie as they do in memory is contiguous.
"""

from torch import Tensor


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The samples `rows`, (M,) int64, of `x` (N, ...): (M, ...)."""
    order = _as_in_memory(x)
    if order is None:
        return x.index_select(0, rows)
    taken = x.permute(order).index_select(0, rows)
    return taken.permute([order.index(dim) for dim in range(len(order))])


def add_rows_(x: Tensor, rows: Tensor, added: Tensor) -> Tensor:
    """Adds `added` (M, ...) to the samples `rows`, (M,) int64, of `x` (N, ...), in place."""
    order = _as_in_memory(x)
    if order is None:
        return x.index_add_(0, rows, added)
    x.permute(order).index_add_(0, rows, added.permute(order))
    return x


def _as_in_memory(x: Tensor) -> list[int] | None:
    """The dims of `x` from the outermost in memory to the innermost; None where they need no other order, or where
    samples are not what is outermost."""
    if x.is_contiguous():
        return None
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda dim: -strides[dim])
    return order if order[0] == 0 else None
