"""Steps as recipes and commands have them: every option by one flat name, whatever group holds it in Python."""

import ast
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import Any, TypeVar, Union

from .steps import UNUSED, Options

S = TypeVar("S", bound=Options)


@dataclass(frozen=True)
class Option:
    """One option of a step.

    hint: the type of its values, as text can give them. group: the field of the step that holds it, and its class; None
    for an everyday one.
    """

    name: str
    hint: Any
    default: object
    help: str
    group: tuple[str, type] | None


def options_of(kind: type[Options]) -> Mapping[str, Option]:
    """The options of a kind of step by name, without those that mean nothing to it."""
    return {option.name: option for option in _options(kind)}


def build(kind: type[S], values: Mapping[str, object]) -> S:
    """The step with these values by flat name, and its defaults for the others."""
    known, own = options_of(kind), dict[str, object]()
    parts: dict[tuple[str, type], dict[str, object]] = {}
    for name, value in values.items():
        group = known[name].group
        (own if group is None else parts.setdefault(group, {}))[name] = value
    return kind(**own, **{name: group(**part) for (name, group), part in parts.items()})


def values_of(step: Options) -> dict[str, object]:
    """All values of a step by flat name."""
    found = options_of(type(step)).values()
    return {o.name: getattr(step if o.group is None else getattr(step, o.group[0]), o.name) for o in found}


def _options(kind: type[Options]) -> Iterator[Option]:
    for each in fields(kind):
        if not is_dataclass(each.default):
            yield Option(each.name, each.type, each.default, _help(kind, each.name), None)
            continue
        group = type(each.default)
        for inner in fields(each.default):
            if inner.name not in each.metadata.get(UNUSED, ()):
                default, text = getattr(each.default, inner.name), _help(group, inner.name)
                yield Option(inner.name, _as_text(inner.type), default, text, (each.name, group))


def _as_text(hint: Any) -> Any:
    """The type without what cannot be written as text: functions."""
    if typing.get_origin(hint) not in (UnionType, Union):
        return hint
    return Union[*(member for member in typing.get_args(hint) if typing.get_origin(member) is not Callable)]


def _help(kind: type, field: str) -> str:
    return _helps(kind.__module__)[kind.__name__, field]


@cache
def _helps(module: str) -> Mapping[tuple[str, str], str]:
    """The text under each field of a module's dataclasses, by class and field."""
    found = {}
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, text in pairwise(kind.body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    found[kind.name, name] = inspect.cleandoc(words)
    return found
