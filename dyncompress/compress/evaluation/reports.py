"""What verbs say of their work: frozen dataclasses that travel with the model as JSON, and come back.

A field that is as its default, None or empty, is left out of the JSON, and what is absent there is the default.
"""

import types
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import fx

from ...errors import RequestError
from ...passes.graph.meta import add_info, info_of
from ...runtime.predict.dynamic import DynamicModel, graph_of

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Base of what a verb reports; `verb` names it in the info of the model."""

    verb: ClassVar[str]

    def keep_in(self, model: fx.GraphModule | DynamicModel) -> None:
        """Lets the model carry it, into checkpoints too."""
        add_info(graph_of(model), self.verb, to_json(self))

    @classmethod
    def is_in(cls, model: fx.GraphModule | DynamicModel) -> bool:
        """Whether a model carries one."""
        return cls.verb in info_of(graph_of(model))

    @classmethod
    def of(cls, model: fx.GraphModule | DynamicModel) -> Self:
        """What a model carries of its making.

        Raises:
            RequestError: it was made by something else.
        """
        if not cls.is_in(model):
            raise RequestError(f"the model carries no report of {cls.verb}: it was made by something else")
        return from_json(cls, info_of(graph_of(model))[cls.verb])


def to_json(value: Any) -> Any:
    """Numbers, text, lists and dicts."""
    if is_dataclass(value):
        held = {field.name: getattr(value, field.name) for field in fields(value)}
        return {field.name: to_json(held[field.name]) for field in fields(value) if held[field.name] != _default(field)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, tuple | list) else value


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def from_json(kind: type[T], plain: Any) -> T:
    """The dataclass that `to_json` made this of; keys that it does not have are passed over."""
    made: T = _read(kind, plain)
    return made


def _read(kind: Any, plain: Any) -> Any:
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{f.name: _read(hints[f.name], plain[f.name]) for f in fields(kind) if f.name in plain})  # type: ignore[operator]
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # one of them is None
        return None if plain is None else _read(next(one for one in inner if one is not types.NoneType), plain)
    if origin is tuple:
        return tuple(_read(inner[0], item) for item in plain)
    if origin is dict:
        return {key: _read(inner[1], item) for key, item in plain.items()}
    return plain
