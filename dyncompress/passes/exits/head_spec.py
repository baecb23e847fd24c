"""Which exit head reads a cut point's tensor, chosen from its shape and dim types."""

from typing import Any

import torch
from torch import Tensor, fx

from ..dims.channels import channel_dim
from ..dims.rule_registry import Typing
from ..graph.walk import uses

aten = torch.ops.aten


def head_spec(types: Typing, node: fx.Node, logits: Tensor, most_weights: int) -> dict[str, Any] | None:
    """The `spec` of the head for a cut at `node`; None where the tensor is no floating-point feature map.

    An image head has the finest grid, up to 4 by 4, that needs no more than `most_weights`. Where the `logits` have
    positions, the features must have the same ones.
    """
    val, classes = node.meta["val"], logits.shape[-1]
    if not val.is_floating_point() or val.dim() < 2:
        return None
    if logits.dim() == 3:
        fits = val.dim() == 3 and val.shape[1] == logits.shape[1] and channel_dim(types, node) == 2
        return {"type": "PositionHead", "args": {"features": val.shape[2], "classes": classes}} if fits else None
    if val.dim() == 2:
        return {"type": "VectorHead", "args": {"features": val.shape[1], "classes": classes}}
    dim = channel_dim(types, node)
    if not dim:
        return None
    size = val.shape[dim]
    if val.dim() == 3 and dim == 2:
        token = _token_read(node)
        return {"type": "TokenHead", "args": {"features": size, "classes": classes, "token": token}}
    space = [s for d, s in enumerate(val.shape) if d not in (0, dim)]
    grid = _finest_grid(space, most_weights // (size * classes))
    args = {"channels": size, "classes": classes, "channel_dim": dim, "grid": grid}
    return {"type": "ImageHead", "args": args}


def _finest_grid(space: list[int], most_cells: int) -> int:
    if len(space) != 2:
        return 1
    return next((g for g in (4, 2) if g * g <= most_cells and not any(s % g for s in space)), 1)


def _token_read(node: fx.Node) -> str:
    """ "first" or "last" where the model itself reads just that token of `node` or of what follows; else "mean"."""
    length = node.meta["val"].shape[1]
    read = (_reads(user, tokens, length) for user, tokens in uses(node))
    return next(filter(None, read), "mean")


def _reads(user: fx.Node, tokens: fx.Node, length: int) -> str | None:
    val = tokens.meta.get("val")
    if tokens.op == "call_module" and isinstance(val, tuple) and user.args[1] == 1:
        return "last"  # the final state of a recurrent layer
    if not isinstance(val, Tensor) or val.dim() != 3 or val.shape[1] != length or user.args[0] is not tokens:
        return None
    if user.target is aten.select.int and user.args[1] == 1:
        start, stop = user.args[2], user.args[2] + 1  # type: ignore[operator]
    elif user.target is aten.slice.Tensor and user.args[1:2] == (1,) and user.meta["val"].shape[1] == 1:
        start, stop = user.args[2], None
    else:
        return None
    if start == 0:
        return "first"
    return "last" if start in (-1, length - 1) and stop in (None, start + 1) else None  # type: ignore[operator]
