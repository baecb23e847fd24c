"""Dimension types: unification by hand, kept indices against numpy, and laws on random types."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyncompress.passes.dims.dims import (
    ONE,
    Atom,
    Concat,
    Dim,
    Product,
    coordinates,
    freeze,
    kept_indices,
    leaves,
    new_size,
    resolve,
    split,
    unify,
)


def test_axis_becomes_a_product() -> None:
    axis, heads, width = Atom(768), Atom(12), Atom(64)
    unify(axis, Product((heads, width)))
    assert resolve(axis) == Product((heads, width))


def test_products_are_split_from_the_left() -> None:
    wide, tail, heads = Atom(768), Atom(5), Atom(12)
    rest = Atom(320)
    unify(Product((wide, tail)), Product((heads, rest)))
    assert repr(resolve(wide)) == "12*64" and repr(resolve(rest)) == "64*5"


def test_concatenations_are_aligned_at_their_boundaries() -> None:
    axis, a, b = Atom(58), Atom(29), Atom(29)
    unify(axis, Concat((a, b)))
    assert list(leaves(axis)) == [a, b]
    c, d = Atom(10), Atom(48)
    unify(axis, Concat((c, d)))
    assert [leaf.size for leaf in leaves(axis)] == [10, 19, 29]


def test_a_concatenation_of_equal_parts_viewed_as_k_rows_unifies_the_parts() -> None:
    a, b, rows, columns = Atom(29), Atom(29), Atom(2), Atom(29)
    unify(Concat((a, b)), Product((rows, columns)))
    assert resolve(a) is resolve(b) is resolve(columns)
    assert list(leaves(rows)) == []  # the two rows cannot go one by one


def test_channel_shuffle_twice_stays_prunable() -> None:
    c = Atom(116)
    for _ in range(2):
        rows, columns = Atom(2), Atom(58)
        unify(c, Product((rows, columns)))
        first, second = split(Product((columns, rows)), [58, 58])
        c = Concat((first, Atom(58)))
        unify(second, Atom(58))
    assert all(leaf.frozen is None for leaf in leaves(c))


def test_freezing_reaches_what_is_bound_later() -> None:
    frozen, other = Atom(6, "an output"), Atom(6)
    unify(other, Product((Atom(2), Atom(3))))
    unify(frozen, other)
    assert {leaf.frozen for leaf in leaves(other)} == {"an output"}


def test_sizes_that_do_not_line_up_freeze_and_say_so() -> None:
    a, b = Product((Atom(4), Atom(3))), Product((Atom(6), Atom(2)))
    unify(a, b)
    assert all("regrouped" in (leaf.frozen or "") for leaf in [*leaves(a), *leaves(b)])
    x, y = Atom(3), Atom(4)
    unify(x, y)
    assert "3 and 4" in (x.frozen or "")


def test_an_axis_that_would_contain_itself_freezes() -> None:
    a = Atom(4)
    unify(a, Concat((Product((a,)), Concat(()))))
    assert a.frozen is None  # the same dim twice is no cycle
    b, c = Atom(6), Atom(3)
    unify(b, Product((Atom(2), c)))
    unify(Product((c, Atom(2))), b)  # c = 2 * ... and 3 does not divide: frozen, not looping
    assert all(leaf.frozen for leaf in leaves(b))


def test_kept_indices_of_a_fused_projection_by_hand() -> None:
    heads, width = Atom(2), Atom(3)
    qkv = Product((Atom(3, "unbound"), heads, width))
    keep = {heads: torch.tensor([1]), width: torch.tensor([0, 2])}
    assert kept_indices(qkv, keep).tolist() == [3, 5, 9, 11, 15, 17]  # type: ignore[union-attr]
    both = Concat((Atom(4), qkv))
    assert kept_indices(both, keep).tolist() == [0, 1, 2, 3, 7, 9, 13, 15, 19, 21]  # type: ignore[union-attr]
    assert kept_indices(Atom(5), keep) is None


def dims(pool: list[Atom]) -> st.SearchStrategy[Dim]:
    leaf = st.sampled_from(pool)
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, min_size=2, max_size=3).map(lambda d: Product(tuple(d))),
            st.lists(inner, min_size=2, max_size=3).map(lambda d: Concat(tuple(d))),
        ),
        max_leaves=5,
    )


POOL = [Atom(2), Atom(3), Atom(4), Atom(6)]


def labels(dim: Dim, of: dict[Atom, np.ndarray]) -> np.ndarray:
    """The dim as an explicit array: each index is a tuple of its atoms' indices, built with numpy."""
    if isinstance(dim, Atom):
        return of[dim]
    if isinstance(dim, Concat):
        return np.concatenate([labels(p, of) for p in dim.parts])
    out = np.ones(1, dtype=bool)
    for factor in dim.factors:
        out = np.multiply.outer(out, labels(factor, of)).reshape(-1)
    return out


@settings(max_examples=200, deadline=None)
@given(dims(POOL), st.data())
def test_kept_indices_equal_an_explicit_mask(dim: Dim, data: st.DataObject) -> None:
    keep = {a: sorted(data.draw(st.sets(st.integers(0, a.size - 1), min_size=1))) for a in POOL}
    masks = {a: np.isin(np.arange(a.size), keep[a]) for a in POOL}
    tensors = {a: torch.tensor(k) for a, k in keep.items()}
    expected = np.flatnonzero(labels(dim, masks))
    kept = kept_indices(dim, tensors)
    assert kept is not None and kept.tolist() == expected.tolist()
    assert new_size(dim, tensors) == len(expected) and resolve(dim).size == dim.size


@settings(max_examples=200, deadline=None)
@given(dims(POOL))
def test_coordinates_list_every_position_of_every_index_once(dim: Dim) -> None:
    for atom, positions in coordinates(dim):
        assert positions.shape[0] == atom.size
        flat = positions.flatten().tolist()
        assert len(set(flat)) == len(flat) and all(0 <= p < dim.size for p in flat)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_unified_dims_are_equal_or_frozen(data: st.DataObject) -> None:
    def draw() -> Dim:
        pool = [Atom(n) for n in (2, 2, 3, 4, 6)]
        return data.draw(dims(pool))

    a, b = draw(), draw()
    unify(a, b)
    if a.size != b.size:
        assert all(leaf.frozen for leaf in [*leaves(a), *leaves(b)])
    elif resolve(a) != resolve(b):
        # the same index set whatever is kept of the axes left free
        free = {leaf for leaf in [*leaves(a), *leaves(b)] if not leaf.frozen}
        keep = {leaf: torch.tensor([leaf.size - 1]) for leaf in free}
        left, right = kept_indices(a, keep), kept_indices(b, keep)
        everything = torch.arange(a.size)
        assert torch.equal(everything if left is None else left, everything if right is None else right)


def test_size_one_is_the_empty_product() -> None:
    assert resolve(Atom(1)) == ONE and resolve(Product((ONE, ONE))) == ONE and math.prod([]) == ONE.size
    freeze(ONE, "nothing to freeze")
