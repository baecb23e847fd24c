"""Checks one call's inputs against what the model was captured with, in the user's own words."""

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...errors import RequestError
from .call_structure import call_structure
from .meta import FixedInput, Input, TensorInput, inputs_of


def flat_inputs(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The call's inputs in the order of the graph's placeholders; arguments may be given by position or by name.

    Raises:
        RequestError: the number, names, nesting, shapes or dtypes of the inputs are not the model's.
    """
    values = _in_order(_argument_names(gm), args, kwargs)
    flat = _flatten(values, call_structure(gm.graph).inputs)
    floats = next((p for p in gm.parameters() if p.is_floating_point()), None)
    for expected, leaf in zip(inputs_of(gm), flat, strict=True):
        _check(expected, leaf, floats)
    return flat


def batch_size(gm: fx.GraphModule, flat: list[Any]) -> int:
    """The number of samples in the flat inputs.

    Raises:
        RequestError: the inputs disagree about it.
    """
    sizes = {given.name: len(x) for given, x in zip(inputs_of(gm), flat, strict=True) if given.per_sample}
    if len(set(sizes.values())) > 1:
        raise RequestError(f"the inputs have different numbers of samples: {sizes}")
    return next(iter(sizes.values()))


class CallReader:
    """Reads the calls of one graph; shapes and dtypes that were right once are not checked again.

    The checks of a call take longer than a layer on one sample. Threads may share a reader.
    """

    _MOST = 1000  # different ones that are remembered

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._names = _argument_names(gm)
        owned = ((m, name, p) for m in gm.modules() for name, p in m.named_parameters(recurse=False))
        self._owner = next(((m, name) for m, name, p in owned if p.is_floating_point()), None)
        self._right: dict[tuple[Any, ...], int] = {}

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], int]:
        """The call's flat inputs and how many samples they hold.

        Raises:
            RequestError: as `flat_inputs` and `batch_size`.
        """
        values = _in_order(self._names, args, kwargs) if kwargs else list(args)
        looks = [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else None for x in values]
        key = (self._weights(), *looks)
        if key in self._right:
            return values, self._right[key]
        flat = flat_inputs(self._gm, args, kwargs)
        n = batch_size(self._gm, flat)
        if None not in looks and len(self._right) < self._MOST:
            self._right[key] = n
        return flat, n

    def _weights(self) -> tuple[torch.dtype, torch.device] | None:
        """The dtype and device that the model has been moved to."""
        if self._owner is None:
            return None
        module, name = self._owner
        weight = module._parameters[name]
        return None if weight is None else (weight.dtype, weight.device)


def _argument_names(gm: fx.GraphModule) -> list[str]:
    return [name for name in call_structure(gm.graph).arguments if name != "self"]


def _in_order(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments in the order of the model's signature."""
    if len(args) == len(names) and not kwargs:
        return list(args)
    takes = f"the model takes {', '.join(names)}"
    if len(args) > len(names):
        raise RequestError(f"{len(args)} positional inputs were given; {takes}")
    given = dict(zip(names, args, strict=False))
    twice, unknown = given.keys() & kwargs.keys(), kwargs.keys() - set(names)
    given |= kwargs
    missing = [name for name in names if name not in given]
    for problem, which in (("given twice", twice), ("unknown", unknown), ("missing", missing)):
        if which:
            raise RequestError(f"input {', '.join(sorted(which))} {problem}; {takes}")
    return [given[name] for name in names]


def _flatten(values: list[Any], wanted: pytree.TreeSpec) -> list[Any]:
    if len(values) == wanted.num_leaves and all(isinstance(value, Tensor) for value in values):
        return values
    positional, named = wanted.child(0), wanted.child(1)
    count = positional.num_children
    call = tuple(values[:count]), dict(zip(named.context, values[count:], strict=True))
    flat, spec = pytree.tree_flatten(call)
    if spec != wanted:
        raise RequestError("the inputs are nested differently from the example_inputs the model was captured with")
    return flat


def _check(expected: Input, leaf: Any, floats: Tensor | None) -> None:
    name = expected.name
    if isinstance(expected, FixedInput):
        if leaf != expected.value:
            raise RequestError(
                f"input '{name}' is {leaf!r}; the model was captured with {expected.value!r} there, capture it again"
            )
        return
    if not isinstance(leaf, Tensor):
        raise RequestError(f"input '{name}' is a {type(leaf).__name__}; give a torch.Tensor")
    _check_shape(expected, leaf)
    _check_dtype(name, expected.dtype, leaf, floats)
    if floats is not None and leaf.device != floats.device:
        raise RequestError(f"input '{name}' is on {leaf.device}, the model on {floats.device}; move one of them")


def _check_shape(expected: TensorInput, leaf: Tensor) -> None:
    name, shape, free = expected.name, expected.shape, expected.dynamic
    fits = leaf.dim() == len(shape) and all(d in free or s == leaf.shape[d] for d, s in enumerate(shape))
    if not fits:
        sizes = ["batch" if d == 0 else "any" if d in free else s for d, s in enumerate(shape)]
        if 0 not in free:
            sizes = list(shape)
        wanted, got = ", ".join(map(str, sizes)), ", ".join(map(str, leaf.shape))
        raise RequestError(f"input '{name}' has shape ({got}); the model takes ({wanted})")


def _check_dtype(name: str, dtype: torch.dtype, leaf: Tensor, floats: Tensor | None) -> None:
    """A floating-point input may also have the dtype the model has been moved to since its capture."""
    moved = dtype.is_floating_point and floats is not None
    allowed = {dtype, floats.dtype} if moved and floats is not None else {dtype}
    if leaf.dtype not in allowed:
        wanted = floats.dtype if moved and floats is not None else dtype
        raise RequestError(f"input '{name}' is {leaf.dtype}; the model takes {wanted}: use {name}.to({wanted})")


Inputs = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]


def split_inputs(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of one call: a tensor, a tuple of arguments, or a dict of keywords."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}
