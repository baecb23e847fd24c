"""A graph with some of its exits only."""

from collections.abc import Sequence

from torch import fx

from ..edit.outputs import all_logits, set_logits
from ..graph.copying import deep_copy
from ..graph.meta import exits_of, set_exits


def keep_exits(gm: fx.GraphModule, kept: Sequence[int]) -> fx.GraphModule:
    """A copy of a graph with exits that has only some of them, by number; what only the others need is gone.

    With none, and no gates, it answers with its logits alone.
    """
    small = deep_copy(gm)
    *early, final = all_logits(small)
    finish_exits(small, [exits_of(gm)[k] for k in kept], [*(early[k] for k in kept), final])
    return small


def finish_exits(gm: fx.GraphModule, followed: Sequence[str], logits: Sequence[fx.Node]) -> None:
    """The exits of a graph are those that follow these nodes; `logits` are theirs, the final ones last."""
    set_exits(gm, followed)
    set_logits(gm, logits)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.recompile()
