"""The fields of options classes, checked by their type hints.

A field is a str, int, float or bool, a choice, a list of such, names with such, or None. Recipe files and the text of
pipelines are read by it; nothing in a text is evaluated or imported.
"""

import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from ..errors import RequestError


def field_types(kind: type) -> dict[str, Any]:
    """The type hint of every field of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def checked_values(allowed: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values as their hinted types; lists become tuples.

    Raises:
        RequestError: a key that is not in `allowed`, or a value of another type; `where` begins the message.
    """
    for key in values:
        if key not in allowed:
            raise RequestError(f"{where}: unknown key {key!r}: use one of {', '.join(allowed)}")
    return {key: _checked(value, allowed[key], f"{where}: {key}") for key, value in values.items()}


def _checked(value: Any, hint: Any, where: str) -> Any:
    for choice in _choices(hint):
        converted = _convert(value, choice)
        if converted is not _NO:
            return converted
    raise RequestError(f"{where}: expected {_described(hint)}, got {value!r}")


_NO = object()  # the value is not of this type


def _convert(value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value if value in typing.get_args(hint) else _NO
    if origin is Mapping:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            return _NO
        found = {key: _convert(item, typing.get_args(hint)[1]) for key, item in value.items()}
        return _NO if _NO in found.values() else found
    if origin is tuple:
        item = typing.get_args(hint)[0]
        items = [_convert(v, item) for v in value] if isinstance(value, list | tuple) else [_NO]
        return _NO if _NO in items else tuple(items)
    if hint is float:
        return _number(value)
    if isinstance(hint, type) and isinstance(value, bool) != (hint is bool):
        return _NO
    return value if isinstance(hint, type) and isinstance(value, hint) else _NO


def _number(value: Any) -> Any:
    """YAML reads 1e-3, without a point, as text."""
    if isinstance(value, bool):
        return _NO
    try:
        return float(value)
    except (TypeError, ValueError):
        return _NO


def _choices(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _described(hint: Any) -> str:
    choices = _choices(hint)
    if len(choices) > 1:
        return " or ".join(map(_described, choices))
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is Mapping:
        return f"names with {_described(typing.get_args(hint)[1])} each"
    if typing.get_origin(hint) is tuple:
        return f"a list of {_described(typing.get_args(hint)[0])}"
    return "null" if hint is type(None) else hint.__name__
