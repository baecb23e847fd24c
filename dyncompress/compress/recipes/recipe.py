"""Recipes: a YAML file that says which model goes through which steps, so that a result can be made again.

    model: zoo:vgg-digits
    data: digits
    steps:
      - prune: {macs: 0.7}
      - convert: {exits: 3, epochs: 5}
      - export: {onnx: model.onnx}

Reading fills in every default, so that the text written beside a result is the whole truth about it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ...errors import RequestError
from ...passes.field_types import checked_values, field_types
from ..options.flat import build, options_of, values_of
from ..options.steps import STEPS, Step


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model, the data it is trained and judged on, and the steps it goes through.

    model and data are a MODEL and a SOURCE of the command line; arch and input_shape help to load the model.
    """

    model: str
    steps: tuple[Step, ...]
    data: str | None = None
    arch: str | None = None
    input_shape: tuple[int, ...] | None = None
    seed: int = 0
    device: str | None = None

    def __str__(self) -> str:
        """The YAML text that reads back as this recipe."""
        plain: dict[str, Any] = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "steps"}
        plain["steps"] = [{step.name: {k: _plain(v) for k, v in values_of(step).items()}} for step in self.steps]
        return yaml.safe_dump(plain, sort_keys=False, width=110)


def read_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, all defaults filled in.

    Args:
        overrides: "key=value" texts; the key is one of the recipe's own or "step.option", the value is YAML.

    Raises:
        RequestError: no such file, no YAML, unknown keys or options, values of another type.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise RequestError(f"{path} is not YAML{line}: {getattr(error, 'problem', error)}") from error
    if not isinstance(tree, dict):
        raise RequestError(f"{path} is not a recipe: expected the keys model and steps")
    recipe = _recipe(tree, str(path))
    for text in overrides:
        recipe = _override(recipe, text)
    return recipe


def _recipe(tree: Mapping[str, Any], where: str) -> Recipe:
    for key in ("model", "steps"):
        if key not in tree:
            raise RequestError(f"{where}: {key!r} is missing")
    steps = tree["steps"]
    if not isinstance(steps, list) or not steps:
        raise RequestError(f"{where}: steps: expected a list of one or more steps, of {', '.join(STEPS)}")
    built = tuple(_step(step, f"{where}: steps[{index}]") for index, step in enumerate(steps))
    own = {key: value for key, value in tree.items() if key != "steps"}
    return Recipe(steps=built, **checked_values(_RECIPE_OPTIONS, own, where))


def _step(tree: Any, where: str) -> Step:
    name, options = (tree, {}) if isinstance(tree, str) else _single(tree, where)
    if name not in STEPS:
        raise RequestError(f"{where}: there is no step {name!r}: use one of {', '.join(STEPS)}")
    if options is not None and not isinstance(options, dict):
        raise RequestError(f"{where}.{name}: expected options such as {{key: value}}, got {options!r}")
    return build(STEPS[name], checked_values(_hints(STEPS[name]), options or {}, f"{where}.{name}"))


def _single(tree: Any, where: str) -> tuple[Any, Any]:
    if not isinstance(tree, dict) or len(tree) != 1:
        raise RequestError(f"{where}: expected one step, such as 'prune: {{macs: 0.7}}', got {tree!r}")
    return next(iter(tree.items()))


def _hints(kind: type[Step]) -> dict[str, Any]:
    return {name: option.hint for name, option in options_of(kind).items()}


_RECIPE_OPTIONS = {key: hint for key, hint in field_types(Recipe).items() if key != "steps"}


def _override(recipe: Recipe, text: str) -> Recipe:
    key, equals, value_text = text.partition("=")
    if not equals:
        raise RequestError(f"--set {text}: write key=value")
    try:
        value = yaml.safe_load(value_text)
    except yaml.YAMLError as error:
        raise RequestError(f"--set {text}: {value_text!r} is not a YAML value") from error
    name, dot, option = key.partition(".")
    if not dot:
        return replace(recipe, **checked_values(_RECIPE_OPTIONS, {key: value}, f"--set {text}"))
    matches = [index for index, step in enumerate(recipe.steps) if step.name == name]
    if len(matches) != 1:
        found = "no step" if not matches else "more than one step"
        raise RequestError(f"--set {text}: the recipe has {found} {name!r}: edit the file")
    steps = list(recipe.steps)
    step = steps[matches[0]]
    changes = checked_values(_hints(type(step)), {option: value}, f"--set {text}")
    steps[matches[0]] = build(type(step), values_of(step) | changes)
    return replace(recipe, steps=tuple(steps))


def _plain(value: object) -> object:
    if callable(value):
        raise RequestError(f"a recipe is text, and {value} is a function: give the name of an optimizer")
    return list(value) if isinstance(value, tuple) else value
