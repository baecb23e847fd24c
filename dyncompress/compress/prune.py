"""One-shot structured pruning: rank every group of the model together, remove the least important up to a target."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.utils.data import Dataset

from ..errors import RequestError
from ..passes.axes import Axes, Axis, infer_axes
from ..passes.capture import Inputs, capture
from ..passes.copying import deep_copy
from ..passes.cost import count_macs, count_parameters
from ..passes.dims import Atom
from ..passes.shrink import shrink_axes
from .importance import l2_scores, normalised, taylor_scores

IMPORTANCES = ("l2", "taylor")


@dataclass(frozen=True)
class Limits:
    """What ranking may not do: `floor` is the least share of an axis that stays, counts are multiples of `round_to`,
    axes with a slice in a module or parameter named in `ignore` stay whole."""

    floor: float = 0.1
    round_to: int = 1
    ignore: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise RequestError(f"floor is a share of each axis, between 0 and 1; got {self.floor}")
        if self.round_to < 1:
            raise RequestError(f"round_to must be at least 1; got {self.round_to}")

    def least(self, size: int) -> int:
        """The smallest allowed count of an axis of `size`."""
        return self.rounded(max(1, int(-(-size * self.floor // 1))), size)

    def rounded(self, count: int, size: int) -> int:
        """`count` up to the next multiple of `round_to`, at most `size`."""
        return min(size, -(-count // self.round_to) * self.round_to)

    def ignores(self, axis: Axis) -> bool:
        """Whether a name in `ignore` is, or contains, a tensor of the axis."""
        tensors = [s.tensor for s in axis.slices]
        return any(t == name or t.startswith(f"{name}.") for t in tensors for name in self.ignore)


def prune(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    ratio: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    importance: str = "l2",
    data: Dataset | None = None,
    floor: float = 0.1,
    round_to: int = 1,
    ignore: Sequence[str] = (),
    exact: bool = False,
) -> fx.GraphModule:
    """A physically smaller copy of `model`, its least important channels, heads, neurons and hidden states removed.

    Args:
        model: any model `capture` takes, or an already captured one (then without `example_inputs`).
        ratio, macs, params: give one: the share of channels, multiply-adds or parameters that stays, in (0, 1].
        importance: "l2" (magnitude) or "taylor" (needs `data`, labelled samples).
        floor: least share of each axis that stays.
        round_to: kept counts are multiples of this.
        ignore: module or parameter names whose axes stay whole.
        exact: norms keep their old counts (see `shrink`).

    Raises:
        RequestError: not exactly one target, a target out of reach, an unknown importance or ignored name.
    """
    gm = model if isinstance(model, fx.GraphModule) and "inputs" in model.meta else _captured(model, example_inputs)
    axes, limits = infer_axes(gm), Limits(floor, round_to, tuple(ignore))
    keep = choose(axes, _score(gm, axes, importance, data), *_target(ratio, macs, params), limits)
    return shrink_axes(axes, keep, exact=exact)


def _captured(model: nn.Module, example_inputs: Inputs | None) -> fx.GraphModule:
    if example_inputs is None:
        raise RequestError("prune needs example_inputs to capture the model")
    return capture(model, example_inputs)


def _target(ratio: float | None, macs: float | None, params: float | None) -> tuple[str, float]:
    given = {k: v for k, v in {"ratio": ratio, "macs": macs, "params": params}.items() if v is not None}
    if len(given) != 1:
        raise RequestError(f"give exactly one of ratio, macs and params; got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if not 0 < value <= 1:
        raise RequestError(f"{name} is the share that stays, above 0 and at most 1; got {value}")
    return name, value


def _score(gm: fx.GraphModule, axes: Axes, importance: str, data: Dataset | None) -> dict[str, Tensor]:
    if importance not in IMPORTANCES:
        raise RequestError(f"unknown importance {importance!r}; choose one of {', '.join(IMPORTANCES)}")
    if importance == "l2":
        return l2_scores(gm, axes.prunable)
    if data is None:
        raise RequestError("importance='taylor' needs data: a dataset of (input, label)")
    return taylor_scores(gm, axes.prunable, data)


def choose(axes: Axes, scores: dict[str, Tensor], metric: str, target: float, limits: Limits) -> dict[Atom, Tensor]:
    """Kept indices by atom: the least important go, until at most `target` of `metric` is left.

    The result is within 2 % of the whole model below the target wherever what can be removed is that fine.

    Raises:
        RequestError: the target cannot be met within the limits.
    """
    _check_ignored(axes, limits)
    candidates = [a for a in axes.prunable if not limits.ignores(a)]
    units = _removal_units(candidates, scores, limits)
    left = _measure(axes, metric, candidates)

    def keep(removed: Sequence[Unit]) -> dict[Atom, Tensor]:
        gone: dict[str, list[Tensor]] = {}
        for unit in removed:
            gone.setdefault(unit.axis.name, []).append(unit.indices)
        return {axes[name].atom: _others(axes[name].size, torch.cat(parts)) for name, parts in gone.items()}

    if left(keep(units)) > target:
        raise RequestError(
            f"{metric}={target} is out of reach: with floor={limits.floor} and round_to={limits.round_to} at least "
            f"{left(keep(units)):.3f} stays; lower floor or round_to, or ignore less"
        )
    low, high = 0, len(units)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if left(keep(units[:middle])) <= target else (middle + 1, high)
    return _refined(units[:high], keep, left, target)


TOLERANCE = 0.02
_REFINEMENTS = 256


def _refined(
    removed: list["Unit"],
    keep: Callable[[Sequence["Unit"]], dict[Atom, Tensor]],
    left: Callable[[dict[Atom, Tensor]], float],
    target: float,
) -> dict[Atom, Tensor]:
    """Where the last unit overshot (a head, a group), the most important of the others come back while they fit."""
    chosen, whole = list(removed), set()
    best = keep(chosen)
    for unit in removed[-2 : -_REFINEMENTS - 2 : -1]:
        if left(best) >= target * (1 - TOLERANCE):
            break
        if unit.axis.name in whole:  # an axis gets its indices back in falling order only
            continue
        trial = keep([u for u in chosen if u is not unit])
        if left(trial) <= target:
            chosen, best = [u for u in chosen if u is not unit], trial
        else:
            whole.add(unit.axis.name)
    return best


@dataclass(frozen=True)
class Unit:
    """Indices of one axis that go together, with their mean normalised score."""

    score: float
    axis: Axis
    indices: Tensor


def _check_ignored(axes: Axes, limits: Limits) -> None:
    for name in limits.ignore:
        if not any(Limits(ignore=(name,)).ignores(axis) for axis in axes):
            raise RequestError(f"ignore names {name!r}, but no parameter of the model is called that or lies below it")


def _removal_units(candidates: list[Axis], scores: dict[str, Tensor], limits: Limits) -> list[Unit]:
    """Blocks of `round_to` indices by rising score, each axis' best `limits.least` left out."""
    units = []
    for axis in candidates:
        score = normalised(scores[axis.name])
        order = score.argsort(stable=True)
        counts = sorted({limits.rounded(n, axis.size) for n in range(limits.least(axis.size), axis.size + 1)})
        ends = [axis.size - n for n in reversed(counts)]
        for begin, end in pairwise(ends):
            block = order[begin:end]
            units.append(Unit(float(score[block].mean()), axis, block))
    return sorted(units, key=lambda unit: unit.score)


def _others(size: int, gone: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero()[:, 0]


def _measure(axes: Axes, metric: str, candidates: list[Axis]) -> Callable[[dict[Atom, Tensor]], float]:
    """The share of `metric` that is left for given kept indices; MACs and parameters are counted on a model that holds
    no data."""
    if metric == "ratio":
        total = sum(a.size for a in candidates)
        return lambda keep: sum(len(keep[a.atom]) if a.atom in keep else a.size for a in candidates) / max(total, 1)
    count = count_macs if metric == "macs" else count_parameters
    gm = axes.types.gm
    ghost_axes = infer_axes(_without_data(gm))
    twin = {axis.atom: ghost_axes[axis.name].atom for axis in candidates}
    whole = count(gm)
    return lambda keep: count(shrink_axes(ghost_axes, {twin[a]: k for a, k in keep.items()})) / max(whole, 1)


def _without_data(gm: fx.GraphModule) -> fx.GraphModule:
    memo: dict[int, object] = {}
    for tensor in [*gm.parameters(), *gm.buffers()]:
        ghost = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(ghost) if isinstance(tensor, nn.Parameter) else ghost
    return deep_copy(gm, memo)
