"""What a captured graph knows about itself: its inputs, its early exits, its skip gates, and what was done to it.

It travels in `gm.meta`, wherever the graph goes, and is read and written here alone. What is absent is not there: a
graph without inputs was not captured. One with exits or gates answers with the plain tuple of its logits, early first;
any other with what the user's model returns, or with its logits alone where passes have gone over it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeGuard

import torch
from torch import fx

from ...errors import RequestError

_INPUTS, _EXITS, _GATES, _INFO = "inputs", "exits", "gates", "info"


@dataclass(frozen=True)
class TensorInput:
    """A tensor that the graph takes: its shape at capture, and the dims that may have any size; dim 0 is the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dynamic: tuple[int, ...]

    @property
    def per_sample(self) -> bool:
        """Whether dim 0 is the batch."""
        return 0 in self.dynamic

    def sized(self, batch: int) -> list[int]:
        """The shape for so many samples."""
        return [batch if dim == 0 and self.per_sample else size for dim, size in enumerate(self.shape)]


@dataclass(frozen=True)
class FixedInput:
    """An input that is no tensor: it has to be what it was at capture."""

    name: str
    value: Any
    per_sample: ClassVar[bool] = False


Input = TensorInput | FixedInput


@dataclass(frozen=True)
class GateNames:
    """A skip gate: its branch, and the names of the nodes of its logit and of its decision, which is logit > 0."""

    branch: str
    logit: str
    open: str


# --- reading ---------------------------------------------------------------------------------------------------------


def is_captured(model: object) -> TypeGuard[fx.GraphModule]:
    """Whether `capture` made it."""
    return isinstance(model, fx.GraphModule) and _INPUTS in model.meta


def inputs_of(gm: fx.GraphModule) -> tuple[Input, ...]:
    """The flat inputs of a captured graph, in the order of its placeholders."""
    inputs: tuple[Input, ...] = gm.meta[_INPUTS]
    return inputs


def exits_of(gm: fx.GraphModule) -> tuple[str, ...]:
    """The names of the nodes that the early exits follow, in graph order."""
    return gm.meta.get(_EXITS, ())


def gates_of(gm: fx.GraphModule) -> tuple[GateNames, ...]:
    """The skip gates, in graph order."""
    return gm.meta.get(_GATES, ())


def is_dynamic(gm: fx.GraphModule) -> bool:
    """Whether the graph has exits or gates, and so answers with the tuple of its logits."""
    return bool(exits_of(gm) or gates_of(gm))


def info_of(gm: fx.GraphModule) -> Mapping[str, Any]:
    """What was done to the model, by verb, and whatever else it was saved with, as JSON; see `save` and `Report`."""
    return gm.meta.get(_INFO, {})


# --- writing ---------------------------------------------------------------------------------------------------------


def set_inputs(gm: fx.GraphModule, inputs: Iterable[Input]) -> None:
    """The flat inputs are these, in the order of the placeholders: the graph counts as captured."""
    gm.meta[_INPUTS] = tuple(inputs)


def set_exits(gm: fx.GraphModule, followed: Iterable[str]) -> None:
    """The exits are those that follow these nodes; the caller sees to the output."""
    _set(gm, _EXITS, tuple(followed))


def set_gates(gm: fx.GraphModule, gates: Iterable[GateNames]) -> None:
    """The gates are these; the caller sees to the output."""
    _set(gm, _GATES, tuple(gates))


def add_info(gm: fx.GraphModule, name: str, said: Any) -> None:
    """Adds to what the model carries, or says it anew; the info of other graphs stays as it is."""
    gm.meta[_INFO] = {**info_of(gm), name: said}


def _set(gm: fx.GraphModule, key: str, value: tuple[Any, ...]) -> None:
    gm.meta.pop(key, None)
    if value:
        gm.meta[key] = value


# --- as plain values, for a file -------------------------------------------------------------------------------------


def plain_meta(gm: fx.GraphModule) -> dict[str, Any]:
    """All of it but the info, as text, numbers, lists and dicts; what others have put into `gm.meta` as it is."""
    plain = {key: value for key, value in gm.meta.items() if key != _INFO}
    if is_captured(gm):
        plain[_INPUTS] = [_plain_input(given) for given in inputs_of(gm)]
    if _EXITS in plain:
        plain[_EXITS] = list(exits_of(gm))
    if _GATES in plain:
        plain[_GATES] = [asdict(gate) for gate in gates_of(gm)]
    return plain


def _plain_input(given: Input) -> dict[str, Any]:
    if isinstance(given, FixedInput):
        return {"name": given.name, "value": given.value}
    dtype = str(given.dtype).removeprefix("torch.")
    return {"name": given.name, "shape": list(given.shape), "dtype": dtype, "dynamic": list(given.dynamic)}


def read_meta(gm: fx.GraphModule, plain: Mapping[str, Any]) -> None:
    """Gives a graph what `plain_meta` wrote, and its info, if `plain` holds one.

    Raises:
        RequestError: an unknown dtype.
    """
    gm.meta.update(plain)
    if _INPUTS in plain:
        set_inputs(gm, map(_read_input, plain[_INPUTS]))
    set_exits(gm, plain.get(_EXITS, ()))
    set_gates(gm, (GateNames(**gate) for gate in plain.get(_GATES, ())))


def _read_input(plain: Mapping[str, Any]) -> Input:
    if "value" in plain:
        return FixedInput(plain["name"], plain["value"])
    dtype = getattr(torch, plain["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise RequestError(f"the input {plain['name']} has the unknown dtype {plain['dtype']!r}")
    return TensorInput(plain["name"], tuple(plain["shape"]), dtype, tuple(plain["dynamic"]))
