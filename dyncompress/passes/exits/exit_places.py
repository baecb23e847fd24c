"""Where exits go: every block, equal shares of the MACs, or by name; before them, all places there are."""

from functools import partial

from torch import fx

from ...errors import RequestError
from ..edit.analysis import Analysis
from ..gates.read_gates import inside_gates
from ..graph.cost import count_parameters
from ..modules.exit_heads import VectorHead
from .head_choice import Place
from .head_spec import head_spec

EVERY = "every"  # for `exits`: after every block
_LEAST_REST = 0.05  # an exit that saves less than this share of the MACs is not worth its head
_HEAD_MACS, _HEAD_PARAMETERS = 0.005, 0.1  # shares of the model up to which a head may read a finer grid
_DETOUR = 0.1  # share of the MACs that an exit may be off its place so that only one tensor crosses there


def exit_places(known: Analysis, logits: fx.Node) -> list[Place]:
    """Every cut point whose tensor a head can read, in graph order; not before a vocabulary's decoder, as dear.

    None is inside a branch that may be skipped.
    """
    most_weights = int(min(_HEAD_MACS * known.total_macs, _HEAD_PARAMETERS * count_parameters(known.gm)))
    answer = logits.meta["val"]
    specs = ((point, head_spec(known.types, point.node, answer, most_weights)) for point in known.cut_points)
    apart = {logits} | inside_gates(known.gm)
    found = [Place(point, spec) for point, spec in specs if spec is not None and point.node not in apart]
    return [p for p in found if p.point.macs + p.position_macs < known.total_macs]


def after_every_block(places: list[Place], total: int) -> list[Place]:
    """Every place where one tensor is live, but for the last MACs. Raises RequestError where there is none."""
    chosen = [p for p in _usable(places, total) if p.point.single]
    if not chosen:
        raise RequestError(f'exits="{EVERY}": the model has no place where only one tensor is live; give node names')
    return chosen


def _usable(places: list[Place], total: int) -> list[Place]:
    return _one_per_cost([p for p in places if 0 < p.point.macs <= (1 - _LEAST_REST) * total])


def at_equal_shares(places: list[Place], count: int, total: int) -> list[Place]:
    """As many places, near equal shares of the MACs. Raises RequestError where there is no room for them."""
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


def by_name(places: list[Place], names: tuple[str, ...]) -> list[Place]:
    """The places that follow these nodes, in graph order. Raises RequestError for any other node."""
    by_name = {p.point.node.name: p for p in places}
    unknown = [n for n in names if n not in by_name]
    if unknown:
        raise RequestError(f"no exit can follow {', '.join(unknown)}; the model's places are: {', '.join(by_name)}")
    return [p for name, p in by_name.items() if name in names]
