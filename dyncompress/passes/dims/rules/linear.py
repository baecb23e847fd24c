"""Linear maps: linear unifies x[-1] with w[1] and gives w[0]; the matmul family contracts; einsum names its dims."""

from typing import Any

from torch import fx, nn

from ..dims import Dim, freeze, unify
from ..rule_registry import Dims, Typing, module_rule, rule
from .elementwise import broadcast


def contract(x: Dims, weight: Dims, bias: Dims) -> Dims:
    """(..., i) with weight (o, i) and bias (o)."""
    unify(x[-1], weight[1])
    if bias:
        unify(weight[0], bias[0])
    return (*x[:-1], weight[0])


@rule("linear")
def linear(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    weight = t.of(a["weight"])
    t.feature(weight[0], "neurons")
    return contract(t.of(a["input"]), weight, t.of(a["bias"]))


@module_rule(nn.Linear)
def linear_module(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    name = a["name"]
    weight = t.param(f"{name}.weight")
    t.feature(weight[0], "neurons")
    bias = t.param(f"{name}.bias") if a["module"].bias is not None else ()
    return contract(t.of(a["input"]), weight, bias)


def matmul_dims(x: Dims, y: Dims) -> Dims:
    """(..., n, k) @ (..., k, m); vectors as torch.matmul takes them."""
    unify(x[-1], y[-2] if len(y) > 1 else y[0])
    rows = x[-2:-1] if len(x) > 1 else ()
    columns = y[-1:] if len(y) > 1 else ()
    return (*broadcast([x[:-2], y[:-2]]), *rows, *columns)


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x, y = list(a.values())[:2]
    out = matmul_dims(t.of(x), t.of(y))
    _mark_feature(t, y, out)
    if isinstance(y, fx.Node) and y.op != "get_attr" and len(out) > 2:  # queries with keys, weights with values
        t.kinds += [(dim, "heads") for dim in out[:-2]] + [(dim, "head dims") for dim in (t.of(x)[-1], t.of(y)[-1])]
    return out


def _mark_feature(t: Typing, weight: Any, out: Dims) -> None:
    if isinstance(weight, fx.Node) and weight.op == "get_attr" and out:
        t.feature(out[-1], "neurons")


@rule("_grouped_mm", "transformers.grouped_mm_fallback")
def grouped(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    """Rows (n, k), sorted by expert, each times its own of the weights (e, k, m): a mixture of experts."""
    x, weight = (t.of(v) for v in list(a.values())[:2])
    freeze(weight[0], "a router chooses among the experts")
    t.kinds.append((weight[0], "experts"))
    t.feature(weight[2], "neurons")
    unify(x[1], weight[1])
    return (x[0], weight[2])


@rule("addmm", "baddbmm", "addbmm", "addmv")
def addmm(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    bias, x, y = list(a.values())[:3] if "self" not in a else (a["self"], *_two(a))
    out = matmul_dims(t.of(x), t.of(y))
    _mark_feature(t, y, out)
    return broadcast([out, t.of(bias)])


def _two(a: dict[str, Any]) -> tuple[Any, Any]:
    names = [n for n in ("mat1", "mat2", "batch1", "batch2", "mat", "vec") if n in a]
    return a[names[0]], a[names[1]]


@rule("einsum")
def einsum(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    equation = a["equation"].replace(" ", "")
    operands = [t.of(x) for x in a["tensors"]]
    inputs, arrow, output = equation.partition("->")
    named: dict[str, Dim] = {}
    batch: list[Dims] = []
    for term, dims in zip(inputs.split(","), operands, strict=True):
        before, dots, after = term.partition("...")
        if dots:
            batch.append(dims[len(before) : len(dims) - len(after)])
        pairs = [*zip(before, dims, strict=False)]
        pairs += [*zip(reversed(after), reversed(dims), strict=False)]
        for letter, dim in pairs:
            if term.count(letter) > 1:
                freeze(dim, "einsum takes a diagonal")
            if letter in named and dim.size != 1 and named[letter].size != 1:
                unify(named[letter], dim)
            if letter not in named or named[letter].size == 1:
                named[letter] = dim
    if not arrow:
        letters = sorted(c for c in set(inputs) - set(",.") if inputs.count(c) == 1)
        output = ("..." if "..." in inputs else "") + "".join(letters)
    before, dots, after = output.partition("...")
    middle = broadcast(batch) if dots else ()
    return (*(named[c] for c in before), *middle, *(named[c] for c in after))


@rule("outer", "ger")
def outer(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x, y = list(a.values())[:2]
    return (*t.of(x), *t.of(y))


@rule("embedding")
def embedding(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    return look_up(t, t.of(a["weight"]), t.of(a["indices"]))


@module_rule(nn.Embedding)
def embedding_module(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    return look_up(t, t.param(f"{a['name']}.weight"), t.of(a["input"]))


def look_up(t: Typing, table: Dims, indices: Dims) -> Dims:
    """Rows of a (count, features) table: the rows are indexed by data and stay."""
    freeze(table[0], "its indices are looked up by data")
    t.feature(table[1], "embedding columns")
    return (*indices, table[1])


@rule("getitem")
def getitem(t: Typing, node: fx.Node, a: dict[str, Any]) -> Any:
    return t.of(node.args[0])[node.args[1]]
