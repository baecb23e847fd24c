"""From recordings at different sizes to one graph: the numbers that differ are written in terms of the input's sizes.

A number v of the recordings, seen where the free sizes s, t (the batch, lengths of token inputs) are s0, s1, .., is

    k * s,  k * s * t     where v / s (v / (s * t)) is the same whole number in every recording, or
    k * s + c             where three recordings lie on that line

and anything else, a flag or a float that differs, a different order of calls, is not recorded.
"""

import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..graph.call_structure import CallStructure, set_call_structure
from .recording import Call, Recording, Source, Subject, Unrecorded, record, without_values

aten = torch.ops.aten
_BATCHES = (59, 61)  # primes, as the capture batch is


@dataclass(frozen=True)
class Free:
    """A free size: the input dims that have it, and its value in each recording."""

    dims: tuple[tuple[str, int], ...]
    sizes: tuple[int, ...]


def recorded(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> fx.Graph:
    """`model` as a graph of ATen operators from recordings; inputs of `batch` samples have a free batch.

    Integer inputs (token ids, masks) keep their other dims free where the model allows it.

    Raises:
        Unrecorded: the recordings do not tell the whole truth about the model.
    """
    names = _leaf_names(model, args, kwargs)
    args, kwargs = pytree.tree_map(_shape_only, (args, kwargs))
    with without_values(model) as subject:
        graph, structure = _recorded(subject, args, kwargs, names, batch)
    arguments = [*_positional(model, len(args)), *kwargs]
    set_call_structure(graph, CallStructure(arguments, pytree.tree_structure((args, kwargs)), structure))
    return graph


def _recorded(
    subject: Subject, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str], batch: int
) -> tuple[fx.Graph, Any]:
    """The graph, and the structure of what the model returns."""
    base = record(subject, args, kwargs, names)

    def at(free: Sequence[Free], number: int) -> Recording:
        return record(subject, *_resized(args, kwargs, names, free, number), names)

    for free in _choices(base.inputs, batch):
        try:
            second = at(free, 1)
        except Unrecorded:
            if len(free) == 1:
                raise
            continue  # the model does not take these lengths
        if len(free) > 1 and len(second.calls) != len(base.calls):
            continue  # a loop over a length, which a graph can only hold unrolled
        try:
            return _Writer([base, second], free).graph(), base.structure
        except Unrecorded:
            return _Writer([base, second, at(free, 2)], free).graph(), base.structure
    raise AssertionError("the last choice has one free size")


def _shape_only(leaf: Any) -> Any:
    return torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf


def _choices(inputs: dict[str, Tensor], batch: int) -> list[list[Free]]:
    """Free sizes to try in turn: every token dim of its own, those of one size together, the batch alone."""
    rows = tuple((name, 0) for name, x in inputs.items() if x.dim() and x.shape[0] == batch)
    tokens = [
        (name, d)
        for name, x in inputs.items()
        if (name, 0) in rows and not x.is_floating_point()
        for d in range(1, x.dim())
        if x.shape[d] > 1
    ]
    free_batch = Free(rows, (batch, *_BATCHES))
    by_size: dict[int, list[tuple[str, int]]] = {}
    for name, d in tokens:
        by_size.setdefault(inputs[name].shape[d], []).append((name, d))
    if not tokens:
        return [[free_batch]]
    own = [Free((dim,), _lengths(inputs[dim[0]].shape[dim[1]], i)) for i, dim in enumerate(tokens)]
    shared = [Free(tuple(dims), _lengths(size, i)) for i, (size, dims) in enumerate(by_size.items())]
    return [[free_batch, *own], [free_batch, *shared], [free_batch]]


def _lengths(size: int, number: int) -> tuple[int, ...]:
    """A length and two others, shorter where possible: a table of positions has an end."""
    steps = (1 + number, 3 + 2 * number)
    sign = -1 if size - steps[1] > 1 else 1
    return size, *(size + sign * step for step in steps)


def _resized(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str], free: Sequence[Free], recording: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    leaves, structure = pytree.tree_flatten((args, kwargs))
    shapes = {name: list(leaf.shape) for name, leaf in zip(names, leaves, strict=True)}
    for size in free:
        for name, d in size.dims:
            shapes[name][d] = size.sizes[recording]
    changed = [leaf.new_empty(shapes[name]) for name, leaf in zip(names, leaves, strict=True)]
    return pytree.tree_unflatten(changed, structure)


def _positional(model: nn.Module, count: int) -> list[str]:
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
        names.append(parameter.name)
    return names[:count]


def _leaf_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    named = [*zip(_positional(model, len(args)), args, strict=True), *kwargs.items()]
    names: list[str] = []
    for name, value in named:
        leaves = pytree.tree_leaves(value)
        names += (
            [name] if leaves == [value] or isinstance(value, Tensor) else [f"{name}_{i}" for i in range(len(leaves))]
        )
    return names


class _Writer:
    """Writes the first of several recordings as a graph whose sizes hold for all of them."""

    def __init__(self, recordings: Sequence[Recording], free: Sequence[Free]) -> None:
        self._recordings = recordings
        self._free = [Free(f.dims, f.sizes[: len(recordings)]) for f in free]
        self._graph = fx.Graph()
        self._values: list[Any] = []  # a node per call
        self._nodes: dict[str, fx.Node] = {}
        self._sizes: dict[tuple[int, ...], fx.Node] = {}

    def graph(self) -> fx.Graph:
        base, *others = self._recordings
        if any(len(other.calls) != len(base.calls) or other.structure != base.structure for other in others):
            raise Unrecorded("what is called depends on the batch size")
        dynamic = {name: [d for free in self._free for n, d in free.dims if n == name] for name in base.inputs}
        for name, tensor in base.tensors.items():
            self._nodes[name] = self._graph.get_attr(name)
            self._nodes[name].meta["val"] = tensor
        for name, tensor in base.inputs.items():
            self._nodes[name] = self._graph.placeholder(name)
            self._nodes[name].meta |= {"val": tensor, "dynamic": dynamic[name]}
        for calls in zip(*(r.calls for r in self._recordings), strict=True):
            self._values.append(self._call(calls))
        outputs = self._written([r.outputs for r in self._recordings])
        self._graph.output(tuple(outputs))
        return self._graph

    def _call(self, calls: tuple[Call, ...]) -> fx.Node:
        first = calls[0]
        if any(call.target is not first.target or call.kwargs.keys() != first.kwargs.keys() for call in calls[1:]):
            raise Unrecorded("what is called depends on the batch size")
        args = self._written([call.args for call in calls])
        kwargs = {name: self._written([call.kwargs[name] for call in calls]) for name in first.kwargs}
        name = str(first.target.overloadpacket).rpartition(".")[2]
        node = self._graph.create_node("call_function", first.target, tuple(args), kwargs, name=name)
        node.meta |= {"val": first.value, "nn_module_stack": {first.path: (first.path, None)}}
        return node

    def _written(self, values: Sequence[Any]) -> Any:
        """One value for those of all recordings: a node for a tensor, and for a number that is not always the same."""
        first = values[0]
        if isinstance(first, Source):
            if any(value != first for value in values[1:]):
                raise Unrecorded("which tensor is read depends on the batch size")
            return self._tensor(first)
        if isinstance(first, tuple | list):
            if any(type(value) is not type(first) or len(value) != len(first) for value in values[1:]):
                raise Unrecorded("a shape's rank depends on the batch size")
            return type(first)([self._written(parts) for parts in zip(*values, strict=True)])
        if all(type(value) is type(first) and (value == first or value != value) for value in values[1:]):
            return first
        if any(type(value) is not int for value in values):
            raise Unrecorded(f"{first!r} depends on the batch size")
        return self._size(tuple(values))

    def _tensor(self, source: Source) -> fx.Node:
        if source.call < 0:
            return self._nodes[source.name]
        node, value = self._values[source.call], self._recordings[0].calls[source.call].value
        return self._item(node, source.output, value) if isinstance(value, tuple | list) else node

    def _item(self, node: fx.Node, index: int, value: Any) -> fx.Node:
        for user in node.users:
            if user.target is operator.getitem and user.args[1] == index:
                return user
        item = self._graph.call_function(operator.getitem, (node, index))
        item.meta |= {**node.meta, "val": value[index]}
        return item

    def _size(self, values: tuple[int, ...]) -> fx.Node:
        if values not in self._sizes:
            factors, scale, offset = self._formula(values)
            node = self._chain(operator.mul, [self._read(free) for free in factors])
            node = self._chain(operator.mul, [node, scale] if scale != 1 else [node])
            self._sizes[values] = self._chain(operator.add, [node, offset] if offset else [node])
        return self._sizes[values]

    def _formula(self, values: tuple[int, ...]) -> tuple[Sequence[Free], int, int]:
        """(factors, k, c) with k * factors + c = the values; see the module's first lines."""
        for degree in (1, 2):
            for factors in combinations_with_replacement(self._free, degree):
                bases = [prod(sizes) for sizes in zip(*(free.sizes for free in factors), strict=True)]
                scale = values[0] // bases[0]
                if all(value == scale * base for value, base in zip(values, bases, strict=True)):
                    return factors, scale, 0
        for free in self._free if len(values) > 2 else ():  # two points are on any line
            step, change = free.sizes[1] - free.sizes[0], values[1] - values[0]
            scale, offset = change // step, values[0] - change // step * free.sizes[0]
            if all(value == scale * size + offset for value, size in zip(values, free.sizes, strict=True)):
                return (free,), scale, offset
        raise Unrecorded(f"{values} follows no plain formula of the input's sizes")

    def _chain(self, function: Any, terms: list[Any]) -> Any:
        result = terms[0]
        for term in terms[1:]:
            value = function(*(t.meta["val"] if isinstance(t, fx.Node) else t for t in (result, term)))
            result = self._graph.call_function(function, (result, term))
            result.meta["val"] = value
        return result

    def _read(self, free: Free) -> fx.Node:
        if free.sizes not in self._sizes:
            name, d = free.dims[0]
            with self._graph.inserting_after(self._nodes[next(reversed(self._recordings[0].inputs))]):
                read = (self._nodes[name], d)
                node = self._graph.create_node("call_function", aten.sym_size.int, read, name="sym_size")
            node.meta["val"] = free.sizes[0]
            self._sizes[free.sizes] = node
        return self._sizes[free.sizes]
