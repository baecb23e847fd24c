"""Operators on trailing spatial dims: pools, pads, interpolation, pixel shuffles, patches. Leading dims pass."""

import math
from typing import Any

from torch import fx

from ..dims import Concat, Dim, Product, freeze, fresh, unify
from ..rule_registry import Dims, Typing, rule

SPATIAL = "a spatial size"


def _keep_leading(t: Typing, node: fx.Node, x: Dims, spatial: int) -> Any:
    for dim in x[len(x) - spatial :]:
        freeze(dim, SPATIAL)

    def out(val: Any) -> Dims:
        return (*x[: len(x) - spatial], *(fresh(s, SPATIAL) for s in val.shape[len(x) - spatial :]))

    val = node.meta["val"]
    return tuple(map(out, val)) if isinstance(val, tuple | list) else out(val)


def _first(a: dict[str, Any]) -> Any:
    return a["self"] if "self" in a else a["input"]


@rule("avg_pool1d", "max_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "max_pool1d_with_indices",
      "upsample_nearest1d", "upsample_linear1d")  # fmt: skip
def pool1d(t: Typing, node: fx.Node, a: dict[str, Any]) -> Any:
    return _keep_leading(t, node, t.of(_first(a)), 1)


@rule("avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool2d_with_indices",
      "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "grid_sampler_2d", "_upsample_bilinear2d_aa",
      "_upsample_bicubic2d_aa")  # fmt: skip
def pool2d(t: Typing, node: fx.Node, a: dict[str, Any]) -> Any:
    return _keep_leading(t, node, t.of(_first(a)), 2)


@rule("avg_pool3d", "max_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d", "upsample_nearest3d",
      "upsample_trilinear3d")  # fmt: skip
def pool3d(t: Typing, node: fx.Node, a: dict[str, Any]) -> Any:
    return _keep_leading(t, node, t.of(_first(a)), 3)


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
      "zero_pad2d")  # fmt: skip
def pad(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    """A padded dim is before + x + after, where the padding keeps its size."""
    x = list(t.of(a["self"]))
    amounts = list(a["pad"] if "pad" in a else a["padding"])
    constant = a.get("mode", "constant") == "constant" and "tion" not in str(node.target)
    for at, size in enumerate(node.meta["val"].shape):
        which = 2 * (len(x) - 1 - at)
        low, high = (*amounts[which : which + 2], 0, 0)[:2]
        if (low, high) == (0, 0):
            continue
        if constant and all(isinstance(n, int) and n >= 0 for n in (low, high)):
            x[at] = Concat((fresh(low, "padding"), x[at], fresh(high, "padding")))
        else:
            freeze(x[at], "padded by its own values or cropped")
            x[at] = fresh(size, "padded by its own values or cropped")
    return tuple(x)


def _blocks(shape: Any, r: int, reason: str) -> list[Dim]:
    return [fresh(r, reason) for _ in shape]


@rule("pixel_shuffle")
def pixel_shuffle(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    """x[-3] = c * r * r."""
    x, r = t.of(a["self"]), a["upscale_factor"]
    channel = fresh(x[-3].size // r**2)
    unify(x[-3], Product((channel, fresh(r, "an upscale factor"), fresh(r, "an upscale factor"))))
    return (*x[:-3], channel, *(fresh(s, SPATIAL) for s in node.meta["val"].shape[-2:]))


@rule("pixel_unshuffle")
def pixel_unshuffle(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x, r = t.of(a["self"]), a["downscale_factor"]
    out = Product((x[-3], fresh(r, "a downscale factor"), fresh(r, "a downscale factor")))
    return (*x[:-3], out, *(fresh(s, SPATIAL) for s in node.meta["val"].shape[-2:]))


@rule("channel_shuffle")
def channel_shuffle(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    """(g, c) becomes (c, g); g stays."""
    x, groups = t.of(a["self"]), a["groups"]
    g, c = fresh(groups, "shuffled groups"), fresh(x[1].size // groups)
    unify(x[1], Product((g, c)))
    return (x[0], Product((c, g)), *x[2:])


@rule("im2col")
def im2col(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x, shape = t.of(a["self"]), node.meta["val"].shape
    patch = fresh(math.prod(a["kernel_size"]), "a kernel size")
    return (x[0], Product((x[1], patch)), fresh(shape[2], SPATIAL))


@rule("col2im")
def col2im(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x, shape = t.of(a["self"]), node.meta["val"].shape
    patch = fresh(math.prod(a["kernel_size"]), "a kernel size")
    channel = fresh(shape[1])
    unify(x[1], Product((channel, patch)))
    freeze(x[2], SPATIAL)
    return (x[0], channel, *(fresh(s, SPATIAL) for s in shape[2:]))
