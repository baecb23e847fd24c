"""Dimension types and their unification.

    dim ::= axis | dim * dim * ... (row-major) | dim + dim + ... (concatenation)

A dim of size 1 is the empty product. Normal form: products are flat and never lead with a concatenation
((a + b) * t = a*t + b*t), concatenations are flat. `unify` makes two dims equal by binding axes, as in Hindley-Milner;
where sizes do not line up it freezes every axis involved, which costs prunability, never correctness.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Atom:
    """An atomic axis of `size` indices; `frozen` says why it cannot shrink, `bound` what unification made of it."""

    __slots__ = ("bound", "frozen", "size")

    def __init__(self, size: int, frozen: str | None = None) -> None:
        self.size = size
        self.frozen = frozen
        self.bound: Dim | None = None

    def __repr__(self) -> str:
        return f"{self.size}{'!' if self.frozen else ''}"


@dataclass(frozen=True)
class Product:
    """Row-major product of factors: the leading factor varies slowest."""

    factors: tuple[Dim, ...]
    size: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", math.prod(f.size for f in self.factors))

    def __repr__(self) -> str:
        return "*".join(f"({f})" if isinstance(f, Concat) else repr(f) for f in self.factors) or "1"


@dataclass(frozen=True)
class Concat:
    """Concatenation of parts, in order."""

    parts: tuple[Dim, ...]
    size: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", sum(p.size for p in self.parts))

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))


Dim = Atom | Product | Concat
ONE = Product(())


def fresh(size: int, frozen: str | None = None) -> Dim:
    """A new atomic axis; the empty product for size 1."""
    return ONE if size == 1 else Atom(size, frozen)


def resolve(dim: Dim) -> Dim:
    """The normal form of `dim` under all bindings made so far."""
    if isinstance(dim, Atom):
        if dim.bound is None:
            return ONE if dim.size == 1 else dim
        dim.bound = resolve(dim.bound)
        return dim.bound
    if isinstance(dim, Concat):
        parts: list[Dim] = []
        for part in map(resolve, dim.parts):
            parts += part.parts if isinstance(part, Concat) else [part] if part.size else []
        return parts[0] if len(parts) == 1 else Concat(tuple(parts))
    factors: list[Dim] = []
    for factor in map(resolve, dim.factors):
        if isinstance(factor, Product):
            factors += factor.factors
        elif factor.size != 1:
            factors.append(factor)
    if len(factors) == 1:
        return factors[0]
    if factors and isinstance(factors[0], Concat):
        rest = tuple(factors[1:])
        return resolve(Concat(tuple(Product((part, *rest)) for part in factors[0].parts)))
    return Product(tuple(factors))


def leaves(dim: Dim) -> Iterator[Atom]:
    """The atoms of a dim, left to right, with repetitions."""
    dim = resolve(dim)
    if isinstance(dim, Atom):
        yield dim
    else:
        for child in dim.factors if isinstance(dim, Product) else dim.parts:
            yield from leaves(child)


def freeze(dim: Dim, reason: str) -> None:
    """Marks every axis in `dim` as not prunable; the first reason stays."""
    for atom in leaves(dim):
        atom.frozen = atom.frozen or reason


def unify(a: Dim, b: Dim) -> None:
    """Makes two dims equal, binding their axes; freezes all of them where they cannot be."""
    a, b = resolve(a), resolve(b)
    if a == b:
        return
    if a.size != b.size:
        _freeze_all((a, b), f"sizes {a.size} and {b.size} meet")
    elif isinstance(a, Atom):
        _bind(a, b)
    elif isinstance(b, Atom):
        _bind(b, a)
    elif isinstance(a, Product) and isinstance(b, Product):
        _unify_products(a, b)
    elif isinstance(a, Concat) and isinstance(b, Concat):
        _unify_concats(a, b)
    elif isinstance(a, Concat):
        assert isinstance(b, Product)
        _unify_concat_product(a, b)
    else:
        assert isinstance(b, Concat) and isinstance(a, Product)
        _unify_concat_product(b, a)


def _freeze_all(dims: Sequence[Dim], reason: str) -> None:
    for dim in dims:
        freeze(dim, reason)


def _bind(atom: Atom, dim: Dim) -> None:
    if any(leaf is atom for leaf in leaves(dim)):
        freeze(dim, "an axis contains itself")
        return
    if atom.frozen:
        freeze(dim, atom.frozen)
    atom.bound = dim


def _unify_products(a: Product, b: Product) -> None:
    """Walks both factor lists from the left; the larger leading factor is split by the smaller."""
    left, right = list(a.factors), list(b.factors)
    while left and right:
        f, g = left[0], right[0]
        if f.size == g.size:
            unify(f, g)
            del left[0], right[0]
            continue
        if f.size < g.size:
            left, right, f, g = right, left, g, f
        if f.size % g.size:
            _freeze_all([*left, *right], f"a factor of {f.size} is regrouped by {g.size}")
            return
        head, tail = fresh(g.size), fresh(f.size // g.size)
        unify(f, Product((head, tail)))
        unify(head, g)
        left[0] = tail
        del right[0]


def _unify_concats(a: Concat, b: Concat) -> None:
    """Aligns the boundaries, cutting parts where they differ."""
    left, right = list(a.parts), list(b.parts)
    while left and right:
        f, g = left[0], right[0]
        if f.size == g.size:
            del left[0], right[0]
            unify(f, g)
            continue
        if f.size < g.size:
            left, right, f, g = right, left, g, f
        pieces = _cut(f, [g.size, f.size - g.size])
        if pieces is None:
            _freeze_all([*left, *right], f"a concatenation of {f.size} is cut at {g.size}")
            return
        left[0:1] = pieces


def _unify_concat_product(concat: Concat, product: Product) -> None:
    """Cuts the product at the boundaries through its leading factor."""
    pieces = _cut(product, [part.size for part in concat.parts])
    if pieces is None:
        _freeze_all((concat, product), f"a product of {product.size} is cut inside a factor")
        return
    for part, piece in zip(concat.parts, pieces, strict=True):
        unify(part, piece)


def _cut(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """`dim` as consecutive pieces of the given sizes, or None where a product without a leading axis would be cut."""
    pieces: list[Dim] = []
    rest = resolve(dim)
    for size in sizes[:-1]:
        halves = _cut_at(rest, size)
        if halves is None:
            return None
        pieces.append(halves[0])
        rest = halves[1]
    return [*pieces, rest]


def _cut_at(dim: Dim, n: int) -> tuple[Dim, Dim] | None:
    """The first n indices of `dim` and the others.

    A product h * t is cut through its leading factor; a boundary inside one index of h is cut through t at that index:
    (h1 + 1 + h2) * t = (h1*t + t1) + (t2 + h2*t).
    """
    dim = resolve(dim)
    if n in (0, dim.size):
        empty = Concat(())
        return (empty, dim) if n == 0 else (dim, empty)
    if isinstance(dim, Atom):
        first, second = fresh(n), fresh(dim.size - n)
        _bind(dim, Concat((first, second)))
        return first, second
    if isinstance(dim, Concat):
        at = next(i for i in range(len(dim.parts)) if sum(p.size for p in dim.parts[: i + 1]) >= n)
        before = sum(p.size for p in dim.parts[:at])
        halves = _cut_at(dim.parts[at], n - before)
        if halves is None:
            return None
        return Concat((*dim.parts[:at], halves[0])), Concat((halves[1], *dim.parts[at + 1 :]))
    if not dim.factors:
        return None
    head, tail = dim.factors[0], Product(dim.factors[1:])
    whole, inside = divmod(n, tail.size)
    if inside and all(leaf.frozen for leaf in leaves(head)):
        return None
    heads = _cut(head, [whole, 1, head.size - whole - 1] if inside else [whole, head.size - whole])
    middle = _cut_at(tail, inside) if inside else (ONE, ONE)
    if heads is None or middle is None:
        return None
    if not inside:
        return Product((heads[0], tail)), Product((heads[1], tail))
    first, _, last = heads
    return Concat((Product((first, tail)), middle[0])), Concat((middle[1], Product((last, tail))))


def split(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Types `dim` as the concatenation of consecutive pieces of these sizes and returns the pieces."""
    pieces = [fresh(size) for size in sizes]
    unify(dim, Concat(tuple(pieces)))
    return pieces


# --- kept indices ------------------------------------------------------------------------------------------------

Keep = Mapping[Atom, Tensor]  # kept indices, ascending; nothing for a branch that goes


def new_size(dim: Dim, keep: Keep) -> int:
    """The size of `dim` once every atom keeps only its indices in `keep` (all of them where it has no entry)."""
    dim = resolve(dim)
    if isinstance(dim, Atom):
        return len(keep[dim]) if dim in keep else dim.size
    if isinstance(dim, Product):
        return math.prod(new_size(f, keep) for f in dim.factors)
    return sum(new_size(p, keep) for p in dim.parts)


def kept_indices(dim: Dim, keep: Keep) -> Tensor | None:
    """Indices of `dim` that stay, ascending int64; None when all do.

    An atom's own; a product's are the outer product of its factors'; a concatenation's are its parts' with offsets.
    """
    dim = resolve(dim)
    if not any(leaf in keep for leaf in leaves(dim)):
        return None
    return _kept(dim, keep)


def _kept(dim: Dim, keep: Keep) -> Tensor:
    if isinstance(dim, Atom):
        return keep[dim] if dim in keep else torch.arange(dim.size)
    if isinstance(dim, Concat):
        offset, indices = 0, []
        for part in dim.parts:
            indices.append(_kept(part, keep) + offset)
            offset += part.size
        return torch.cat(indices)
    indices_so_far = torch.zeros(1, dtype=torch.int64)
    for factor in dim.factors:
        indices_so_far = (indices_so_far[:, None] * factor.size + _kept(factor, keep)).flatten()
    return indices_so_far


def coordinates(dim: Dim) -> Iterator[tuple[Atom, Tensor]]:
    """For each occurrence of an atom in `dim`: (atom, int64 tensor (atom.size, m)) whose row i lists the m positions
    along `dim` that belong to the atom's index i."""
    dim = resolve(dim)
    yield from _coordinates(dim, torch.arange(dim.size))


def _coordinates(dim: Dim, positions: Tensor) -> Iterator[tuple[Atom, Tensor]]:
    """`positions` has shape (..., dim.size): where each index of `dim` sits, over any outer copies."""
    if isinstance(dim, Atom):
        yield dim, positions.reshape(-1, dim.size).T
    elif isinstance(dim, Concat):
        offset = 0
        for part in dim.parts:
            yield from _coordinates(part, positions[..., offset : offset + part.size])
            offset += part.size
    else:
        grid = positions.reshape(-1, *(f.size for f in dim.factors))
        for at, factor in enumerate(dim.factors, start=1):
            yield from _coordinates(factor, grid.movedim(at, -1))
