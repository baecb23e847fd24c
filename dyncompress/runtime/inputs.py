"""Checks one call's inputs against what the model was captured with, in the user's own words."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import RequestError


def flat_inputs(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The call's inputs in the order of the graph's placeholders; arguments may be given by position or by name.

    Raises:
        RequestError: the number, names, nesting, shapes or dtypes of the inputs are not the model's.
    """
    info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]
    values = _in_order([name for name in info.orig_args if name != "self"], args, kwargs)
    flat = _flatten(values, info.in_spec)
    floats = _first_float(gm)
    for expected, leaf in zip(gm.meta["inputs"], flat, strict=True):
        _check(expected, leaf, floats)
    return flat


_OWNERS: WeakKeyDictionary[nn.Module, tuple[nn.Module, str]] = WeakKeyDictionary()


def _first_float(gm: fx.GraphModule) -> Tensor | None:
    """The first floating-point parameter; its owner is remembered, because walking a model costs as much as a layer."""
    if gm not in _OWNERS:
        owned = ((m, n) for m in gm.modules() for n, p in m._parameters.items() if p is not None)
        found = next(((m, n) for m, n in owned if m._parameters[n].is_floating_point()), None)  # type: ignore[union-attr]
        if found is None:
            return None
        _OWNERS[gm] = found
    module, name = _OWNERS[gm]
    return module._parameters[name]


def batch_size(gm: fx.GraphModule, flat: list[Any]) -> int:
    """The number of samples in the flat inputs.

    Raises:
        RequestError: the inputs disagree about it.
    """
    sizes = {s["name"]: len(x) for s, x in zip(gm.meta["inputs"], flat, strict=True) if 0 in s.get("dynamic", ())}
    if len(set(sizes.values())) > 1:
        raise RequestError(f"the inputs have different numbers of samples: {sizes}")
    return next(iter(sizes.values()))


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


def _check(expected: dict[str, Any], leaf: Any, floats: Tensor | None) -> None:
    name = expected["name"]
    if "value" in expected:
        if leaf != expected["value"]:
            raise RequestError(
                f"input '{name}' is {leaf!r}; the model was captured with {expected['value']!r} there, capture it again"
            )
        return
    if not isinstance(leaf, Tensor):
        raise RequestError(f"input '{name}' is a {type(leaf).__name__}; give a torch.Tensor")
    _check_shape(name, expected, leaf)
    _check_dtype(name, getattr(torch, expected["dtype"]), leaf, floats)
    if floats is not None and leaf.device != floats.device:
        raise RequestError(f"input '{name}' is on {leaf.device}, the model on {floats.device}; move one of them")


def _check_shape(name: str, expected: dict[str, Any], leaf: Tensor) -> None:
    shape, free = expected["shape"], expected["dynamic"]
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
