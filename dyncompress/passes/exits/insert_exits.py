"""Early exits (BranchyNet, Teerapittayanon et al. 2016; Shallow-Deep Networks, Kaya et al. 2019) put into a graph."""

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from torch import fx

from ...errors import RequestError
from ..edit.analysis import analyse
from ..edit.copied_tail import copy_tail
from ..edit.flow import Flow
from ..edit.graft import insert_head
from ..edit.outputs import OWN, find_logits
from ..graph.cost import node_macs
from ..graph.graph_pass import HAS_EXITS, NO_EXITS, Condition, GraphPass, PassResult, no_module
from ..modules.multi_layer_heads import Cascade, Ensemble
from ..rewrites.unstack_recurrent import UnstackRecurrent
from .exit_places import EVERY, after_every_block, at_equal_shares, by_name, exit_places
from .head_choice import CASCADE, COPY, HEAD_KINDS, Place, last_place_like, make_head
from .keep_exits import finish_exits
from .own_exits import use_own_exits
from .read_exits import exit_nodes, graph_exits


@dataclass(frozen=True)
class InsertedExit:
    """The node that an exit follows and the path of its module, the share of the model's MACs spent before it, and the
    MACs of its head."""

    at: str
    path: str
    share: float
    head_macs: int


@dataclass(frozen=True)
class InsertedExits:
    """The exits, early first, the MACs of the model without them, and the recurrent modules that were unstacked."""

    exits: tuple[InsertedExit, ...]
    macs: int
    unstacked: tuple[str, ...]


@dataclass(frozen=True)
class InsertExits(GraphPass[InsertedExits]):
    """Adds early exits: a head after each of some cut points.

    1. `exits` a number: at equal shares of the MACs, k/(exits + 1), each at the nearest place left;
    2. `exits` node names: after exactly these nodes;
    3. `exits` "every": after every block (see `blocks`);
    4. `exits` "own": the model's own classifiers, where it returns several logits of one shape, early first;
    5. a recurrent module of several layers is unstacked first, so that an exit can follow any of them.

    `head` is one of `HEAD_KINDS` (`head_choice`), the same for all. The heads become the modules ``exits.0``,
    ``exits.1``, ...; the graph's output becomes the plain tuple of every exit's logits, (batch, classes) or (batch,
    time, classes), the model's own last; `exits_of` names the nodes that the exits follow.

    Raises:
        RequestError: the model has no logits output of such a shape, too few places for exits, or none for such heads.
    """

    name: ClassVar[str] = "insert-exits"
    requires: ClassVar[tuple[Condition, ...]] = (no_module("exits"), NO_EXITS)
    ensures: ClassVar[tuple[Condition, ...]] = (HAS_EXITS,)
    exits: int | str | tuple[str, ...] = 3
    head: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.exits, list):
            object.__setattr__(self, "exits", tuple(self.exits))
        if self.exits == () or (isinstance(self.exits, int) and self.exits < 1):
            raise RequestError(f"exits={self.exits!r}: give a number of at least 1, or names of graph nodes")
        if isinstance(self.exits, str) and self.exits not in (EVERY, OWN):
            raise RequestError(f'exits={self.exits!r}: give a number, a list of graph nodes, "{EVERY}" or "{OWN}"')
        if self.head not in HEAD_KINDS:
            raise RequestError(f"head={self.head!r}: use one of {', '.join(HEAD_KINDS)}")

    def rewrite(self, gm: fx.GraphModule) -> PassResult[InsertedExits]:
        unstacked: tuple[str, ...] = ()
        if self.exits == OWN:
            if self.head != HEAD_KINDS[0]:
                raise RequestError(f'exits="{OWN}" keeps the classifiers of the model: leave out head={self.head}')
            use_own_exits(gm)
        else:
            logits = find_logits(gm)
            unstacked = UnstackRecurrent().rewrite(gm).report.paths
            self._add(gm, logits)
        return PassResult(gm, True, _report(gm, unstacked))

    def _add(self, gm: fx.GraphModule, logits: fx.Node) -> None:
        known = analyse(gm)
        total, places = known.total_macs, exit_places(known, logits)
        if isinstance(self.exits, int):
            chosen = at_equal_shares(places, self.exits, total)
        elif self.exits == EVERY:
            chosen = after_every_block(places, total)
        else:
            assert isinstance(self.exits, tuple)
            chosen = by_name(places, self.exits)
        _insert(gm, known.flow, logits, places, chosen, self.head)


def _report(gm: fx.GraphModule, unstacked: tuple[str, ...]) -> InsertedExits:
    extra, costs = exit_nodes(gm), node_macs(gm)
    spent = dict(zip(costs, accumulate(0 if n in extra else macs for n, macs in costs.items()), strict=True))
    total = max(spent.values())
    exits = tuple(
        InsertedExit(
            exit.at.name, exit.at.meta.get("path", ""), spent[exit.at] / total, sum(costs[n] for n in exit.nodes)
        )
        for exit in graph_exits(gm)
    )
    return InsertedExits(exits, total, unstacked)


def _insert(
    gm: fx.GraphModule, flow: Flow, logits: fx.Node, places: list[Place], chosen: list[Place], kind: str
) -> None:
    early, followed = [], []
    before: fx.Node | None = None
    for k, place in enumerate(chosen):
        at, path = place.point.node, f"exits.{k}"
        if kind == COPY:
            early.append(copy_tail(gm, path, flow, last_place_like(place, places), logits, at))
        elif kind == CASCADE:
            at = before = _cascade(gm, path, place, before)
            ensemble = Ensemble(k + 1, logits.meta["val"].shape[-1])
            early.append(insert_head(gm, f"{path}.ensemble", ensemble, (at,), at))
        else:
            early.append(insert_head(gm, path, make_head(kind, place), (at,), at))
        followed.append(at.name)
    finish_exits(gm, followed, [*early, logits])


def _cascade(gm: fx.GraphModule, path: str, place: Place, before: fx.Node | None) -> fx.Node:
    """The exit's own answer, behind those of the exits before it."""
    at = place.point.node
    z = insert_head(gm, f"{path}.head", make_head(CASCADE, place), (at,), at)
    inputs = (z,) if before is None else (z, before)
    return insert_head(gm, f"{path}.cascade", Cascade(z.meta["val"].shape[1], before is None), inputs, z)
