"""Classifiers that a model has already become its exits."""

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...errors import RequestError
from ..edit.outputs import OWN, is_logits
from ..graph.walk import upstream
from .keep_exits import finish_exits


def use_own_exits(gm: fx.GraphModule) -> None:
    """Makes exits of a model's own classifiers: its outputs are logits of one shape, early first.

    Raises:
        RequestError: it is not, or what leads to one of them does not start from a single tensor.
    """
    flat = pytree.tree_leaves(gm.graph.output_node().args[0])
    logits = [n for n in flat if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), Tensor) and is_logits(n)]
    shapes = {n.meta["val"].shape for n in logits}
    if len(logits) != len(flat) or len(flat) < 2 or len(shapes) != 1:
        raise RequestError(
            f'exits="{OWN}" needs a model that returns several logits of one shape, early first; this one returns '
            f"{len(flat)} outputs, {len(logits)} of them logits"
        )
    followed = [_read_by_head(logits, k).name for k in range(len(logits) - 1)]
    finish_exits(gm, followed, logits)


def _read_by_head(logits: list[fx.Node], k: int) -> fx.Node:
    """The one node that what only `logits[k]` needs starts from."""
    own = upstream([logits[k]]) - upstream(logits[:k] + logits[k + 1 :])
    read = {n.name: n for node in own for n in node.all_input_nodes if n not in own}
    if len(read) != 1:
        raise RequestError(
            f'exits="{OWN}": the classifier {logits[k].name} reads {", ".join(read) or "nothing"}, not one tensor; '
            "samples cannot leave there"
        )
    return next(iter(read.values()))
