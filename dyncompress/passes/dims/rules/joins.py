"""Concatenations and their inverses: cat gives a + b, split cuts it; stacked, selected and unbound dims stay."""

from typing import Any

from torch import fx

from ..dims import Concat, Dim, Product, freeze, fresh, split, unify
from ..rule_registry import Dims, Typing, rule


@rule("cat", "concat", "concatenate", "hstack", "vstack")
def cat(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    parts = [t.of(x) for x in a["tensors"] if x.meta["val"].numel() or x.meta["val"].dim() > 1]
    out: list[Dim] = list(parts[0])
    at = a.get("dim", 0) % len(out)
    for part in parts[1:]:
        for d in range(len(out)):
            if d != at:
                unify(out[d], part[d])
    out[at] = Concat(tuple(part[at] for part in parts))
    return tuple(out)


@rule("stack")
def stack(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    parts = [t.of(x) for x in a["tensors"]]
    for part in parts[1:]:
        for have, want in zip(parts[0], part, strict=True):
            unify(have, want)
    out = list(parts[0])
    out.insert(a["dim"] % (len(out) + 1), fresh(len(parts), "stacked"))
    return tuple(out)


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split_rule(t: Typing, node: fx.Node, a: dict[str, Any]) -> tuple[Dims, ...]:
    x = list(t.of(a["self"]))
    at = a.get("dim", 0)
    pieces = t.pieces[node] = split(x[at], [part.shape[at] for part in node.meta["val"]])
    return tuple(tuple(piece if d == at % len(x) else x[d] for d in range(len(x))) for piece in pieces)


@rule("unbind")
def unbind(t: Typing, node: fx.Node, a: dict[str, Any]) -> tuple[Dims, ...]:
    x = t.of(a["self"])
    at = a["dim"] % len(x)
    freeze(x[at], "unbound: each index has its own use")
    return (x[:at] + x[at + 1 :],) * len(node.meta["val"])


@rule("select")
def select(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x = t.of(a["self"])
    at = a["dim"] % len(x)
    freeze(x[at], "one of its indices is selected")
    return x[:at] + x[at + 1 :]


@rule("slice", "narrow")
def slice_rule(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    """x[start:end] = the middle of (before + middle + after); x[k::s] = the n of n * s, which stays in step."""
    x = list(t.of(a["self"]))
    at, step = a["dim"] % len(x), a.get("step", 1)
    have, want = x[at].size, node.meta["val"].shape[at]
    if have == want and step == 1:
        return tuple(x)
    start = a.get("start") or 0
    if isinstance(start, int) and 0 <= start < step and have == want * step:
        kept = fresh(want)
        unify(x[at], Product((kept, fresh(step, "interleaved"))))
        x[at] = kept
        return tuple(x)
    fixed = isinstance(start, int) and not isinstance(a.get("end", a.get("length")), fx.Node) and step == 1
    if not fixed:
        freeze(x[at], "sliced by a run-time size or a step")
        x[at] = fresh(want, "sliced by a run-time size or a step")
        return tuple(x)
    start = start + have if start < 0 else start
    t.pieces[node] = split(x[at], [start, want, have - start - want])
    x[at] = t.pieces[node][1]
    return tuple(x)
