"""A graph with some of its exits only."""

from collections.abc import Sequence

from torch import fx

from ..edit.outputs import all_logits, plain_outputs
from ..graph.copying import deep_copy


def keep_exits(gm: fx.GraphModule, kept: Sequence[int]) -> fx.GraphModule:
    """A copy of a graph with exits that has only some of them, by number; what only the others need is gone."""
    small = deep_copy(gm)
    logits = all_logits(small)
    small.graph.output_node().args = ((*(logits[k] for k in kept), logits[-1]),)
    finish_exits(small, [gm.meta["exits"][k] for k in kept])
    return small


def finish_exits(gm: fx.GraphModule, followed: list[str]) -> None:
    plain_outputs(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.meta["exits"] = followed
    gm.recompile()
