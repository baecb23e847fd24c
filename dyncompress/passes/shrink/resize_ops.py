"""The sizes that operator calls spell out (view, expand, split, groups, ...), written again from the new dims."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..dims.dims import Dim, Keep, new_size
from ..dims.rule_registry import Typing
from ..graph.nodes import bound_args, op_name

aten = torch.ops.aten
Resizer = Callable[[Typing, fx.Node, fx.Node, Keep], None]


def resize_ops(types: Typing, twins: list[tuple[fx.Node, fx.Node]], keep: Keep) -> None:
    """Updates the calls of the new graph; `twins` pairs each typed old node with its new one."""
    for old, new in twins:
        resizer = _RESIZERS.get(op_name(old)) if old.op == "call_function" else None
        if resizer is not None:
            resizer(types, old, new, keep)


def set_arg(node: fx.Node, name: str, value: Any) -> None:
    """Sets a call's argument by its schema name."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    at = names.index(name)
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)


def _resize(node: fx.Node, arg: Any, dim: Dim, keep: Keep) -> Any:
    """A size argument after shrinking; a symbolic one is scaled by new / old, which types make exact."""
    old, new = dim.size, new_size(dim, keep)
    if old == new or (isinstance(arg, int) and arg == -1):
        return arg
    if not isinstance(arg, fx.Node):
        return new
    with node.graph.inserting_before(node):
        scaled = node.graph.call_function(operator.mul, (arg, new))
        result = node.graph.call_function(operator.floordiv, (scaled, old))
    scaled.meta, result.meta = {**arg.meta, "val": arg.meta["val"] * new}, {**arg.meta, "val": new}
    return result


def _sizes(argument: str, skip_from: str | None = None) -> Resizer:
    def resize(types: Typing, old: fx.Node, new: fx.Node, keep: Keep) -> None:
        args = bound_args(new)
        dims = types.dims[old]
        if argument not in args:  # a view that changes the dtype
            return
        sizes = list(args[argument])
        if skip_from is not None:
            start = args[skip_from] % (len(dims) - len(sizes) + 1)
            dims = dims[start : start + len(sizes)]
        set_arg(new, argument, [_resize(new, s, d, keep) for s, d in zip(sizes, dims, strict=True)])

    return resize


def _groups(argument: str) -> Resizer:
    def resize(types: Typing, old: fx.Node, new: fx.Node, keep: Keep) -> None:
        set_arg(new, argument, new_size(types.groups[old], keep))

    return resize


def _normalized_shape(types: Typing, old: fx.Node, new: fx.Node, keep: Keep) -> None:
    rank = len(bound_args(new)["normalized_shape"])
    set_arg(new, "normalized_shape", [new_size(d, keep) for d in types.dims[old][-rank:]])


def _slice(types: Typing, old: fx.Node, new: fx.Node, keep: Keep) -> None:
    if old not in types.pieces:
        return
    before, middle, after = types.pieces[old]
    if all(new_size(d, keep) == d.size for d in (before, middle, after)):
        return
    start, length = new_size(before, keep), new_size(middle, keep)
    set_arg(new, "start", start)
    if op_name(old) == "narrow":
        set_arg(new, "length", length)
    else:
        set_arg(new, "end", start + length)


def _split(types: Typing, old: fx.Node, new: fx.Node, keep: Keep) -> None:
    sizes = [new_size(d, keep) for d in types.pieces[old]]
    if sizes != [d.size for d in types.pieces[old]]:
        args = bound_args(new)
        new.target, new.args, new.kwargs = aten.split_with_sizes.default, (args["self"], sizes, args["dim"]), {}


def _attention_scale(types: Typing, old: fx.Node, new: fx.Node, keep: Keep) -> None:
    width = types.dims[old.args[0]][-1]  # type: ignore[index]
    if bound_args(old).get("scale") is None and new_size(width, keep) != width.size:
        new.update_kwarg("scale", width.size**-0.5)


_RESIZERS: dict[str, Resizer] = {
    **dict.fromkeys(("view", "_unsafe_view", "expand", "broadcast_to", "_reshape_alias"), _sizes("size")),
    **dict.fromkeys(("zeros", "ones", "full", "empty"), _sizes("size")),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _sizes("size")),
    "reshape": _sizes("shape"),
    "unflatten": _sizes("sizes", skip_from="dim"),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _groups("groups")),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _groups("groups")),
    "group_norm": _groups("num_groups"),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized_shape),
    **dict.fromkeys(("slice", "narrow"), _slice),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"), _split),
    "scaled_dot_product_attention": _attention_scale,
}
