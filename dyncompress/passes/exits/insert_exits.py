"""Early exits (BranchyNet, Teerapittayanon et al. 2016; Shallow-Deep Networks, Kaya et al. 2019) put into a graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

from torch import Tensor, fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from ...errors import RequestError
from ..dims.type_graph import Typing, type_graph
from ..edit.flow import Flow, cut_points
from ..edit.graft import all_logits, copy_tail, exit_nodes, graph_exits, insert_head, needed_for
from ..gates.read_gates import inside_gates
from ..graph.copying import deep_copy
from ..graph.cost import count_macs, count_parameters, node_macs
from ..graph.graph_pass import GraphPass, PassResult
from ..modules.multi_layer_heads import Cascade, Ensemble
from ..rewrites.unstack_recurrent import unstack_recurrent
from .head_choice import CASCADE, COPY, HEAD_KINDS, Place, last_place_like, make_head
from .head_spec import VectorHead, head_spec

EVERY, OWN = "every", "own"

_LEAST_REST = 0.05  # an exit that saves less than this share of the MACs is not worth its head
_HEAD_MACS, _HEAD_PARAMETERS = 0.005, 0.1  # shares of the model up to which a head may read a finer grid
_DETOUR = 0.1  # share of the MACs that an exit may be off its place so that only one tensor crosses there


@dataclass(frozen=True)
class InsertExits(GraphPass):
    """Adds early exits: a head after each of some cut points.

    1. `exits` a number: at equal shares of the MACs, k/(exits + 1), each at the nearest place left;
    2. `exits` node names: after exactly these nodes;
    3. `exits` "every": after every block (see `blocks`);
    4. `exits` "own": the model's own classifiers, where it returns several logits of one shape, early first;
    5. a recurrent module of several layers is unstacked first (see `unstack`), so that an exit can follow any of them.

    `head` is one of `HEAD_KINDS` (`head_choice`), the same for all. The heads become the modules ``exits.0``,
    ``exits.1``, ...; the graph's output becomes the plain tuple of every exit's logits, (batch, classes) or (batch,
    time, classes), the model's own last; `gm.meta["exits"]` lists the nodes that the exits follow.

    Raises:
        RequestError: the model has no logits output of such a shape, too few places for exits, or none for such heads.
    """

    name: ClassVar[str] = "insert-exits"
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

    def rewrite(self, gm: fx.GraphModule) -> PassResult:
        if gm.meta.get("exits") or hasattr(gm, "exits"):
            raise RequestError("the model already has a module named 'exits'; insert all exits in one pass")
        unstacked: list[str] = []
        if self.exits == OWN:
            if self.head != HEAD_KINDS[0]:
                raise RequestError(f'exits="{OWN}" keeps the classifiers of the model: leave out head={self.head}')
            use_own_exits(gm)
        else:
            logits = find_logits(gm)
            unstacked = unstack_recurrent(gm)
            self._add(gm, logits)
        return PassResult(gm, True, {**_report(gm), "unstacked": unstacked})

    def _add(self, gm: fx.GraphModule, logits: fx.Node) -> None:
        types, total = type_graph(gm), count_macs(gm)
        places = exit_places(gm, types, logits)
        if isinstance(self.exits, int):
            chosen = _at_equal_shares(places, self.exits, total)
        elif self.exits == EVERY:
            chosen = _after_every_block(places, total)
        else:
            assert isinstance(self.exits, tuple)
            chosen = _by_name(places, self.exits)
        _insert(gm, Flow(gm, types), logits, places, chosen, self.head)


def _report(gm: fx.GraphModule) -> dict[str, Any]:
    """MACs of the model without exits, and for every exit the share of them spent before it and those of its head."""
    extra, costs = exit_nodes(gm), node_macs(gm)
    spent = dict(zip(costs, accumulate(0 if n in extra else macs for n, macs in costs.items()), strict=True))
    total = max(spent.values())
    exits = [
        {
            "at": exit.at.name,
            "path": exit.at.meta.get("path", ""),
            "share": spent[exit.at] / total,
            "head_macs": sum(costs[n] for n in exit.nodes),
        }
        for exit in graph_exits(gm)
    ]
    return {"exits": exits, "macs": total}


def find_logits(gm: fx.GraphModule) -> fx.Node:
    """The output node that holds the (batch, classes) or (batch, time, classes) logits.

    It is the only tensor output; else what the model calls `logits`; else the only (batch, n) floating-point output.

    Raises:
        RequestError: there is none, or not just one.
    """
    flat = [n for n in pytree.tree_leaves(gm.graph.output_node().args[0]) if isinstance(n, fx.Node)]
    tensors = [n for n in dict.fromkeys(flat) if isinstance(n.meta.get("val"), Tensor)]
    vectors = [n for n in tensors if _is_logits(n) and n.meta["val"].dim() == 2]
    named = _named_logits(gm)
    found = tensors if len(tensors) == 1 else [named] if named is not None else vectors
    if len(found) != 1 or not _is_logits(found[0]):
        shapes = ", ".join(f"{n.name} {('batch', *n.meta['val'].shape[1:])}" for n in tensors) or "none"
        own = f'; exits="{OWN}" takes the classifiers of a model that has several' if len(vectors) > 1 else ""
        raise RequestError(
            f"exits need one (batch, classes) logits output with at least 2 classes, or (batch, time, classes); the "
            f"model's tensor outputs are: {shapes} - return the logits alone or under the key 'logits'{own}"
        )
    return found[0]


def _is_logits(node: fx.Node) -> bool:
    val = node.meta["val"]
    return val.dim() in (2, 3) and val.is_floating_point() and val.shape[-1] > 1


def _named_logits(gm: fx.GraphModule) -> fx.Node | None:
    """The output under the key or attribute `logits` of the user's own output structure."""
    info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]
    if info.out_spec is None:
        return None
    flat = pytree.tree_leaves(gm.graph.output_node().args[0])
    output = pytree.tree_unflatten(flat, info.out_spec)
    named = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    return named if isinstance(named, fx.Node) else None


# --- where -------------------------------------------------------------------------------------------------------


def exit_places(gm: fx.GraphModule, types: Typing, logits: fx.Node) -> list[Place]:
    """Every cut point whose tensor a head can read, in graph order; not before a vocabulary's decoder, as dear.

    None is inside a branch that may be skipped.
    """
    most_weights = int(min(_HEAD_MACS * count_macs(gm), _HEAD_PARAMETERS * count_parameters(gm)))
    specs = ((p, head_spec(types, p.node, logits.meta["val"], most_weights)) for p in cut_points(gm, types))
    total = count_macs(gm)
    apart = {logits} | inside_gates(gm)
    found = [Place(point, spec) for point, spec in specs if spec is not None and point.node not in apart]
    return [p for p in found if p.point.macs + p.position_macs < total]


def _after_every_block(places: list[Place], total: int) -> list[Place]:
    chosen = [p for p in _usable(places, total) if p.point.single]
    if not chosen:
        raise RequestError(f'exits="{EVERY}": the model has no place where only one tensor is live; give node names')
    return chosen


def _usable(places: list[Place], total: int) -> list[Place]:
    return _one_per_cost([p for p in places if 0 < p.point.macs <= (1 - _LEAST_REST) * total])


def _at_equal_shares(places: list[Place], count: int, total: int) -> list[Place]:
    usable = _usable(places, total)
    if not usable:
        raise RequestError(
            f"exits={count}: the model has no place for an exit, that is no features with the batch as their first dim "
            f"before the last {_LEAST_REST:.0%} of its MACs"
        )
    if len(usable) < count:
        names = ", ".join(p.point.node.name for p in usable)
        raise RequestError(f"exits={count}: the model has room for {len(usable)} ({names}); ask for fewer")
    chosen: list[Place] = []
    first = 0
    for k in range(count):
        window = usable[first : len(usable) - (count - k) + 1]  # leaves a place for each exit to come
        best = min(window, key=partial(_distance, goal=(k + 1) / (count + 1), total=total))
        chosen.append(best)
        first = usable.index(best) + 1
    return chosen


def _distance(place: Place, goal: float, total: int) -> float:
    """How far `place` is from a share `goal` of the MACs; more than one tensor to carry on counts as a detour."""
    return abs(place.point.macs / total - goal) + (0 if place.point.single else _DETOUR)


def _one_per_cost(places: list[Place]) -> list[Place]:
    """Of places with no MACs between them (a layer, its norm and activation) the last, if possible with one tensor.

    A map is taken before it is flattened: its head is as many times smaller as the map has positions.
    """
    best: dict[int, Place] = {}
    for place in places:
        rival = best.get(place.point.macs)
        if rival is None or _rank(place) >= _rank(rival):
            best[place.point.macs] = place
    return list(best.values())


def _rank(place: Place) -> tuple[bool, bool]:
    return place.point.single, place.spec["type"] != VectorHead.__name__


def _by_name(places: list[Place], names: tuple[str, ...]) -> list[Place]:
    by_name = {p.point.node.name: p for p in places}
    unknown = [n for n in names if n not in by_name]
    if unknown:
        raise RequestError(f"no exit can follow {', '.join(unknown)}; the model's places are: {', '.join(by_name)}")
    return [p for name, p in by_name.items() if name in names]


# --- insertion ---------------------------------------------------------------------------------------------------


def _insert(
    gm: fx.GraphModule, flow: Flow, logits: fx.Node, places: list[Place], chosen: list[Place], kind: str
) -> None:
    output = gm.graph.output_node()
    early, followed = [], []
    before: fx.Node | None = None
    for k, place in enumerate(chosen):
        at, path = place.point.node, f"exits.{k}"
        if kind == COPY:
            early.append(copy_tail(gm, path, flow, last_place_like(place, places), logits, at))
        elif kind == CASCADE:
            at = before = _cascade(gm, path, place, before, k)
            ensemble = Ensemble(k + 1, logits.meta["val"].shape[-1])
            early.append(insert_head(gm, f"{path}.ensemble", ensemble, (at,), at))
        else:
            early.append(insert_head(gm, path, make_head(kind, place), (at,), at))
        followed.append(at.name)
    output.args = ((*early, logits),)
    _finish(gm, followed)


def _cascade(gm: fx.GraphModule, path: str, place: Place, before: fx.Node | None, k: int) -> fx.Node:
    """The exit's own answer, behind those of the exits before it."""
    at = place.point.node
    z = insert_head(gm, f"{path}.head", make_head(CASCADE, place), (at,), at)
    inputs = (z,) if before is None else (z, before)
    return insert_head(gm, f"{path}.cascade", Cascade(z.meta["val"].shape[1], before is None), inputs, z)


def keep_exits(gm: fx.GraphModule, kept: Sequence[int]) -> fx.GraphModule:
    """A copy of a graph with exits that has only some of them, by number; what only the others need is gone."""
    small = deep_copy(gm)
    logits = all_logits(small)
    small.graph.output_node().args = ((*(logits[k] for k in kept), logits[-1]),)
    _finish(small, [gm.meta["exits"][k] for k in kept])
    return small


def final_features(gm: fx.GraphModule) -> fx.Node:
    """What the last layer before the final logits of a graph with exits reads."""
    return all_logits(gm)[-1].all_input_nodes[0]


def use_own_exits(gm: fx.GraphModule) -> None:
    """Makes exits of a model's own classifiers: its outputs are logits of one shape, early first.

    Raises:
        RequestError: it is not, or what leads to one of them does not start from a single tensor.
    """
    flat = pytree.tree_leaves(gm.graph.output_node().args[0])
    logits = [n for n in flat if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), Tensor) and _is_logits(n)]
    shapes = {n.meta["val"].shape for n in logits}
    if len(logits) != len(flat) or len(flat) < 2 or len(shapes) != 1:
        raise RequestError(
            f'exits="{OWN}" needs a model that returns several logits of one shape, early first; this one returns '
            f"{len(flat)} outputs, {len(logits)} of them logits"
        )
    followed = [_read_by_head(gm, logits, k).name for k in range(len(logits) - 1)]
    gm.graph.output_node().args = (tuple(logits),)
    _finish(gm, followed)


def _read_by_head(gm: fx.GraphModule, logits: list[fx.Node], k: int) -> fx.Node:
    """The one node that what only `logits[k]` needs starts from."""
    own = needed_for([logits[k]]) - needed_for(logits[:k] + logits[k + 1 :])
    read = {n.name: n for node in own for n in node.all_input_nodes if n not in own}
    if len(read) != 1:
        raise RequestError(
            f'exits="{OWN}": the classifier {logits[k].name} reads {", ".join(read) or "nothing"}, not one tensor; '
            "samples cannot leave there"
        )
    return next(iter(read.values()))


def _finish(gm: fx.GraphModule, followed: list[str]) -> None:
    plain_outputs(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.meta["exits"] = followed
    gm.recompile()


def plain_outputs(graph: fx.Graph) -> None:
    """Lets a graph return its output as it stands; its call keeps the user's own structure."""
    info = graph._codegen.pytree_info  # type: ignore[attr-defined]
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(info.orig_args, info.in_spec, None)))
