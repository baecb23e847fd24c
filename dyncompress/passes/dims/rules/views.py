"""Views: the same elements, regrouped. Dims whose sizes multiply to the same product are regrouped as products."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from ..dims import ONE, Dim, Product, fresh, unify
from ..rule_registry import Dims, Typing, rule


def regroup(dims: Dims, out: Sequence[Dim]) -> Dims:
    """Types `out` (one dim per output size) as a row-major regrouping of `dims`, segment by segment."""
    result = list(out)
    i = j = 0
    while i < len(dims) and j < len(out):
        first, begin = i, j
        have, want = dims[i].size, out[j].size
        while have != want:
            if have < want:
                i += 1
                have *= dims[i].size
            else:
                j += 1
                want *= out[j].size
        i, j = i + 1, j + 1
        if j - begin == 1:
            whole = Product(dims[first:i])
            unify(whole, out[begin])
            result[begin] = whole
        else:
            unify(Product(dims[first:i]), Product(tuple(out[begin:j])))
    return tuple(result)


def _sizes(t: Typing, node: fx.Node, asked: Sequence[Any]) -> list[Dim]:
    shape = node.meta["val"].shape
    return [t.size(arg, size) for arg, size in zip(asked, shape, strict=True)]


@rule("view", "reshape", "_unsafe_view", "_reshape_alias")
def view(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    asked = a["size"] if "size" in a else a.get("shape")
    if asked is None:
        reason = "a view that changes the dtype"
        t.freeze_all(t.of(a["self"]), reason)
        return tuple(fresh(s, reason) for s in node.meta["val"].shape)
    return regroup(t.of(a["self"]), _sizes(t, node, asked))


@rule("view_as", "reshape_as")
def view_as(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    return regroup(t.of(a["self"]), t.of(a["other"]))


@rule("flatten", "unflatten", "ravel")
def flatten(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    return regroup(t.of(a["self"]), [fresh(s) for s in node.meta["val"].shape])


@rule("squeeze", "unsqueeze", "atleast_2d", "atleast_3d")
def squeeze(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    kept = iter(d for d in t.of(a["self"]) if d.size != 1)
    return tuple(next(kept) if s != 1 else ONE for s in node.meta["val"].shape)


@rule("permute")
def permute(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x = t.of(a["self"])
    return tuple(x[d] for d in a["dims"])


@rule("transpose", "swapaxes", "swapdims")
def transpose(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    dims = list(t.of(a["self"]))
    i, j = (a[k] for k in (("dim0", "dim1") if "dim0" in a else ("axis0", "axis1")))
    dims[i], dims[j] = dims[j], dims[i]
    return tuple(dims)


@rule("t", "numpy_T", "mT", "adjoint")
def t_(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x = t.of(a["self"])
    return (*x[:-2], *reversed(x[-2:]))


@rule("movedim", "moveaxis")
def movedim(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x = t.of(a["self"])
    source, target = ([v] if isinstance(v, int) else v for v in (a["source"], a["destination"]))
    moved = {to % len(x): fro % len(x) for fro, to in zip(source, target, strict=True)}
    others = iter(d for d in range(len(x)) if d not in moved.values())
    return tuple(x[moved[d]] if d in moved else x[next(others)] for d in range(len(x)))


@rule("expand", "expand_as", "broadcast_to")
def expand(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x, shape = t.of(a["self"]), node.meta["val"].shape
    if "other" in a:
        wanted: Sequence[Dim] = t.of(a["other"])
    else:
        wanted = _sizes(t, node, a["size"])
    new = len(shape) - len(x)
    out = list(wanted[:new])
    for have, want in zip(x, wanted[new:], strict=True):
        if have.size != 1:
            unify(have, want)
        out.append(have if have.size != 1 else want)
    return tuple(out)


@rule("repeat", "tile")
def repeat(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x, counts = t.of(a["self"]), a["repeats"] if "repeats" in a else a["dims"]
    shape = node.meta["val"].shape
    x = (ONE,) * (len(shape) - len(x)) + x
    counts = [1] * (len(shape) - len(counts)) + list(counts)
    out = []
    for have, count, size in zip(x, counts, shape, strict=True):
        times = t.size(count, size // have.size if have.size else 0)
        if not isinstance(count, fx.Node):
            t.freeze_all(times, "a repeat count")
        out.append(Product((times, have)))
    return tuple(out)


@rule("repeat_interleave")
def repeat_interleave(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    """Each index is repeated in place: x[d] * count."""
    shape = node.meta["val"].shape
    if a.get("dim") is None or not isinstance(a.get("repeats"), int):
        t.freeze_all(t.of(a.get("self")), "repeated by data")
        return tuple(fresh(s, "repeated by data") for s in shape)
    dims = list(t.of(a["self"]))
    dims[a["dim"]] = Product((dims[a["dim"]], fresh(a["repeats"], "a repeat count")))
    return tuple(dims)


@rule("unfold")
def unfold(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x = list(t.of(a["self"]))
    at = a["dimension"]
    t.freeze_all(x[at], "sliding windows")
    x[at] = fresh(node.meta["val"].shape[at], "sliding windows")
    return (*x, fresh(a["size"], "sliding windows"))
