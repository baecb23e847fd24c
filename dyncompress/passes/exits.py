"""Early exits (BranchyNet, Teerapittayanon et al. 2016; Shallow-Deep Networks, Kaya et al. 2019) put into a graph."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from ..errors import RequestError
from .blocks import CutPoint, cut_points
from .cost import count_macs, count_parameters
from .heads import HEADS, VectorHead, head_spec
from .result import GraphPass, PassResult
from .typing import Typing, type_graph
from .unstack import unstack_recurrent

_LEAST_REST = 0.05  # an exit that saves less than this share of the MACs is not worth its head
_HEAD_MACS, _HEAD_PARAMETERS = 0.005, 0.1  # shares of the model up to which a head may read a finer grid
_DETOUR = 0.1  # share of the MACs that an exit may be off its place so that only one tensor crosses there


@dataclass(frozen=True)
class Place:
    """A cut point that can take an exit, and the spec of the head it would get."""

    point: CutPoint
    spec: dict[str, Any]


@dataclass(frozen=True)
class InsertExits(GraphPass):
    """Adds early exits: a head after each of some cut points.

    1. `exits` a number: at equal shares of the MACs, k/(exits + 1), each at the nearest place left;
    2. `exits` node names: after exactly these nodes;
    3. a recurrent module of several layers is unstacked first (see `unstack`), so that an exit can follow any of them.

    The heads become the modules ``exits.0``, ``exits.1``, ...; the graph's output becomes the plain tuple of every
    exit's (batch, classes) logits, the model's own last; `gm.meta["exits"]` lists the nodes that the exits follow.

    Raises:
        RequestError: the model has no single (batch, classes) logits output, or too few places for exits.
    """

    name: ClassVar[str] = "insert-exits"
    exits: int | tuple[str, ...] = 3

    def __post_init__(self) -> None:
        if isinstance(self.exits, list):
            object.__setattr__(self, "exits", tuple(self.exits))
        if self.exits == () or (isinstance(self.exits, int) and self.exits < 1):
            raise RequestError(f"exits={self.exits!r}: give a number of at least 1, or names of graph nodes")

    def rewrite(self, gm: fx.GraphModule) -> PassResult:
        if hasattr(gm, "exits"):
            raise RequestError("the model already has a module named 'exits'; insert all exits in one pass")
        logits, unstacked = find_logits(gm), unstack_recurrent(gm)
        types, total = type_graph(gm), count_macs(gm)
        classes = logits.meta["val"].shape[1]
        places = exit_places(gm, types, classes)
        if isinstance(self.exits, int):
            chosen = _at_equal_shares(places, self.exits, total)
        else:
            chosen = _by_name(places, self.exits)
        _insert(gm, logits, chosen)
        report = [
            {
                "at": place.point.node.name,
                "path": place.point.node.meta.get("path", ""),
                "share": place.point.macs / total,
                "head": place.spec,
                "head_macs": head.macs_per_sample,
            }
            for place, head in zip(chosen, gm.get_submodule("exits").children(), strict=True)
        ]
        return PassResult(gm, True, {"exits": report, "macs": total, "unstacked": unstacked})


def find_logits(gm: fx.GraphModule) -> fx.Node:
    """The output node that holds the (batch, classes) logits.

    It is the only tensor output; else what the model calls `logits`; else the only (batch, n) floating-point output.

    Raises:
        RequestError: there is none, or not just one.
    """
    flat = [n for n in pytree.tree_leaves(gm.graph.output_node().args[0]) if isinstance(n, fx.Node)]
    tensors = [n for n in dict.fromkeys(flat) if isinstance(n.meta.get("val"), Tensor)]
    vectors = [n for n in tensors if _is_logits(n)]
    named = _named_logits(gm)
    found = tensors if len(tensors) == 1 else [named] if named is not None else vectors
    if len(found) != 1 or not _is_logits(found[0]):
        shapes = ", ".join(f"{n.name} {('batch', *n.meta['val'].shape[1:])}" for n in tensors) or "none"
        raise RequestError(
            f"exits need one (batch, classes) logits output with at least 2 classes; the model's tensor outputs are: "
            f"{shapes} - return the logits alone or under the key 'logits'"
        )
    return found[0]


def _is_logits(node: fx.Node) -> bool:
    val = node.meta["val"]
    return val.dim() == 2 and val.is_floating_point() and val.shape[1] > 1


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


def exit_places(gm: fx.GraphModule, types: Typing, classes: int) -> list[Place]:
    """Every cut point whose tensor a head can read, in graph order."""
    most_weights = int(min(_HEAD_MACS * count_macs(gm), _HEAD_PARAMETERS * count_parameters(gm)))
    specs = ((p, head_spec(types, p.node, classes, most_weights)) for p in cut_points(gm, types))
    return [Place(point, spec) for point, spec in specs if spec is not None]


def _at_equal_shares(places: list[Place], count: int, total: int) -> list[Place]:
    usable = _one_per_cost([p for p in places if 0 < p.point.macs <= (1 - _LEAST_REST) * total])
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


def _insert(gm: fx.GraphModule, logits: fx.Node, chosen: list[Place]) -> None:
    output = gm.graph.output_node()
    parameter = next(gm.parameters())
    early = []
    for k, place in enumerate(chosen):
        at = place.point.node
        head = HEADS[place.spec["type"]](**place.spec["args"]).to(parameter.device, at.meta["val"].dtype)
        gm.add_submodule(f"exits.{k}", head.train(gm.training))
        with gm.graph.inserting_after(at):
            early.append(gm.graph.call_module(f"exits.{k}", (at,)))
        shape = (at.meta["val"].shape[0], logits.meta["val"].shape[1])
        early[-1].meta = {"val": torch.empty(shape, dtype=at.meta["val"].dtype, device="meta"), "path": f"exits.{k}"}
    output.args = ((*early, logits),)
    plain_outputs(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.meta["exits"] = [place.point.node.name for place in chosen]
    gm.recompile()


def plain_outputs(graph: fx.Graph) -> None:
    """Lets a graph return its output as it stands; its call keeps the user's own structure."""
    info = graph._codegen.pytree_info  # type: ignore[attr-defined]
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(info.orig_args, info.in_spec, None)))


def exit_heads(gm: fx.GraphModule) -> list[fx.Node]:
    """The head calls of a graph with exits, early first.

    Raises:
        RequestError: the graph has no exits.
    """
    if not gm.meta.get("exits"):
        raise RequestError("the graph has no exits; run InsertExits on it first")
    return list(gm.graph.output_node().args[0])[:-1]  # type: ignore[arg-type]
