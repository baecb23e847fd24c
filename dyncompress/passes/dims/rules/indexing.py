"""Indexing by data: the indexed dim keeps its indices; the others pass through."""

from typing import Any

from torch import fx

from ..dims import freeze, fresh
from ..rule_registry import Dims, Typing, rule
from .elementwise import broadcast

REASON = "indexed by data"


@rule("index")
def index(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x, indices = t.of(a["self"]), a["indices"]
    used = [d for d, i in enumerate(indices) if i is not None]
    for d in used:
        freeze(x[d], REASON)
    picked = broadcast([t.of(indices[d]) for d in used])
    rest = [x[d] for d in range(len(x)) if d not in used]
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    out = (*rest[:at], *picked, *rest[at:])
    shape = node.meta["val"].shape
    return tuple(d if d.size == s else fresh(s, REASON) for d, s in zip(out, shape, strict=True))


@rule("index_select")
def index_select(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x = list(t.of(a["self"]))
    at = a["dim"]
    freeze(x[at], REASON)
    x[at] = fresh(node.meta["val"].shape[at], REASON)
    return tuple(x)


@rule("index_put")
def index_put(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    """x with x[indices] = values: the values' last dims are those that are not indexed."""
    x, values = t.of(a["self"]), t.of(a["values"])
    used = [d for d, i in enumerate(a["indices"]) if i is not None]
    for d in used:
        freeze(x[d], REASON)
    rest = [x[d] for d in range(len(x)) if d not in used]
    broadcast([tuple(rest), values[len(values) - len(rest) :] if rest else ()])
    return x


@rule("histc", "bincount")
def count(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    t.freeze_all(t.of(a["self"]), REASON)
    return tuple(fresh(s, "counts") for s in node.meta["val"].shape)


@rule("gather", "take_along_dim")
def gather(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    t.freeze_all(t.of(a["self"]), REASON)
    return t.of(a.get("index", a.get("indices")))


@rule("roll", "flip", "cumsum", "cumprod")
def reorder(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    """Operators in which the place of an index matters."""
    x = t.of(a["self"])
    dims = a.get("dims", a.get("dim"))
    for d in [dims] if isinstance(dims, int) else dims or range(len(x)):
        freeze(x[d], "the order of its indices matters")
    return x


@rule("diff")
def diff(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    """Differences of neighbours: one index less for each repetition."""
    x, at = list(t.of(a["self"])), a["dim"]
    freeze(x[at], "the order of its indices matters")
    x[at] = fresh(node.meta["val"].shape[at], "the order of its indices matters")
    return tuple(x)


@rule("tril", "triu")
def triangle(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x = t.of(a["self"])
    t.freeze_all(x[-2:], "the order of its indices matters")
    return x
