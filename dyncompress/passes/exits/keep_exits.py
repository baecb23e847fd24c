"""A graph with some of its exits only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ...errors import RequestError
from ..edit.outputs import all_logits, set_logits
from ..graph.graph_pass import HAS_EXITS, Condition, GraphPass, PassResult
from ..graph.meta import exits_of, set_exits


@dataclass(frozen=True)
class KeptExits:
    """The nodes that the exits that are left follow, in graph order."""

    exits: tuple[str, ...]


@dataclass(frozen=True)
class KeepExits(GraphPass[KeptExits]):
    """Keeps some of the exits, by number from 0; what only the others need is gone.

    With none, and no gates, the graph answers with its logits alone.

    Raises:
        RequestError: the graph has no exits, or none of such a number.
    """

    name: ClassVar[str] = "keep-exits"
    requires: ClassVar[tuple[Condition, ...]] = (HAS_EXITS,)
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", tuple(sorted(set(self.kept))))

    def rewrite(self, gm: fx.GraphModule) -> PassResult[KeptExits]:
        *early, final = all_logits(gm)
        followed = exits_of(gm)
        unknown = [k for k in self.kept if not 0 <= k < len(followed)]
        if unknown:
            raise RequestError(f"there is no exit {unknown[0]}; the model has {len(followed)}, numbered from 0")
        finish_exits(gm, [followed[k] for k in self.kept], [*(early[k] for k in self.kept), final])
        return PassResult(gm, len(self.kept) < len(followed), KeptExits(exits_of(gm)))


def finish_exits(gm: fx.GraphModule, followed: Sequence[str], logits: Sequence[fx.Node]) -> None:
    """The exits of a graph are those that follow these nodes; `logits` are theirs, the final ones last."""
    set_exits(gm, followed)
    set_logits(gm, logits)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.recompile()
