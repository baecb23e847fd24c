"""Reductions and softmax. Sums and means may run over a shrinking axis (exact while what is removed is zero);
softmax, extrema and sorting may not."""

from typing import Any

from torch import fx

from ..dims import ONE, Dim, freeze, fresh
from ..rule_registry import Dims, Typing, rule


def _reduced(a: dict[str, Any], rank: int) -> list[int]:
    dims = a.get("dim")
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def _without(x: Dims, reduced: list[int], keepdim: bool) -> Dims:
    if keepdim:
        return tuple(ONE if d in reduced else dim for d, dim in enumerate(x))
    return tuple(dim for d, dim in enumerate(x) if d not in reduced)


@rule("sum", "mean", "var", "std", "norm", "linalg_vector_norm", "var_mean", "std_mean")
def average(t: Typing, node: fx.Node, a: dict[str, Any]) -> Any:
    x = t.of(a["self"] if "self" in a else a["x"])
    reduced = _reduced(a, len(x))
    t.statistic(node, [x[d] for d in reduced])
    out = _without(x, reduced, bool(a.get("keepdim", False)))
    return (out, out) if isinstance(node.meta["val"], tuple | list) else out


@rule(
    "amax", "amin", "max", "min", "prod", "any", "all", "logsumexp", "argmax", "argmin", "median", "mode", "aminmax",
    "count_nonzero",
)  # fmt: skip
def extremum(t: Typing, node: fx.Node, a: dict[str, Any]) -> Any:
    if "other" in a:  # the elementwise maximum(a, b) overload
        from .elementwise import pointwise

        return pointwise(t, node, a)
    x = t.of(a["self"])
    reduced = _reduced(a, len(x))
    for d in reduced:
        freeze(x[d], "compared across its indices")
    out = _without(x, reduced, bool(a.get("keepdim", False)))
    val = node.meta["val"]
    return (out,) * len(val) if isinstance(val, tuple | list) else out


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "softmin")
def softmax(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x = t.of(a["self"])
    freeze(x[a["dim"]], "softmaxed")
    return x


@rule("topk", "sort", "kthvalue")
def topk(t: Typing, node: fx.Node, a: dict[str, Any]) -> Any:
    x = list(t.of(a["self"]))
    freeze(x[a["dim"]], "sorted")
    values = node.meta["val"][0]
    out: list[Dim] = [d if d.size == s else fresh(s, "sorted") for d, s in zip(x, values.shape, strict=False)]
    return (tuple(out), tuple(out))
