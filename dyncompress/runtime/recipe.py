"""Recipes: a YAML file that says which model goes through which steps, so that a result can be made again.

    model: zoo:vgg-digits
    data: digits
    steps:
      - prune: {macs: 0.7}
      - convert: {exits: 3, epochs: 5}
      - export: {onnx: model.onnx}

A step is a frozen dataclass; its fields are its options here, in Python and on the command line. Reading fills in every
default, so that the text written beside a result is the whole truth about it.
"""

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from ..errors import RequestError

Importance = Literal["l1", "l2", "taylor", "hessian", "bn-scale", "geometric-median", "lamp", "activation", "random"]

TrainingRecipe = Literal[
    "distill",
    "distill-all",
    "sum",
    "weighted",
    "teachers",
    "ramped",
    "hints",
    "two-stage",
    "frozen-teacher",
    "balanced",
    "ztw",
]


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Removes the least important channels, heads and hidden units: physically, everywhere they occur."""

    name: ClassVar[str] = "prune"

    ratio: float | None = None
    """Share of the channels that stays, 0..1. Give one of ratio, macs, params, bytes and latency."""
    macs: float | None = None
    """Share of the multiply-accumulates that stays, 0..1."""
    params: float | None = None
    """Share of the parameters that stays, 0..1."""
    bytes: float | None = None
    """Share of the bytes of parameters and buffers that stays, 0..1."""
    latency: float | None = None
    """Share of the wall clock, measured on the model's device, that stays, 0..1."""
    importance: Importance = "l2"
    """How channels are ranked; taylor, hessian and activation need data."""
    scope: Literal["global", "axis", "block"] | None = None
    """All channels compete, or every axis, or every block, loses the same share.

    By default axis, and global with latency or depth."""
    floor: float = 0.1
    """Least share of every axis that stays."""
    ceiling: float = 1.0
    """Largest share of every axis that stays."""
    round_to: int | None = None
    """Keep a multiple of this many channels of every axis; by default 1, with latency 8 or 16 where an axis is wide."""
    ignore: tuple[str, ...] = ()
    """Modules or parameters whose axes stay whole, by name."""
    exact: bool = False
    """Norms keep dividing by their old counts."""
    depth: bool = False
    """Whole residual branches may go as well."""
    latency_batch: int = 1
    """Samples per call when latency is measured."""
    steps: int = 1
    """Number of cuts, each ranked anew."""
    finetune: int = 0
    """Epochs of training after every cut; needs data."""
    lr: float = 1e-3
    """Peak learning rate of that training."""
    batch_size: int = 128
    """Samples per step of that training."""


@dataclass(frozen=True, kw_only=True)
class Sparsify:
    """Trains with group lasso, which drives whole groups of weights to zero; they leave the model. Needs data."""

    name: ClassVar[str] = "sparsify"

    macs: float | None = None
    """Share of the multiply-accumulates that stays, 0..1. Give one of macs, params, strength and penalty_ratio."""
    params: float | None = None
    """Share of the parameters that stays, 0..1."""
    strength: float | None = None
    """Factor of the penalty, constant, instead of one that rises until a share is reached."""
    penalty_ratio: float | None = None
    """The same, chosen so that the penalty is this share of the first loss; such as 0.2, with sgd."""
    epochs: int = 10
    """Passes over the training split with group lasso."""
    finetune: int = 5
    """Passes after them without it."""
    shrink_every: int = 2
    """Epochs after which zeroed groups leave the model."""
    kinds: tuple[str, ...] = ("axes",)
    """Groups: axes, layers, an axis kind such as channels or heads; or filters, columns, shapes, tiles."""
    floor: float = 0.1
    """Least share of every axis that stays."""
    ignore: tuple[str, ...] = ()
    """Modules or parameters whose axes stay whole, by name."""
    ema: float | None = None
    """Decay of an average of the weights, which the result then has, such as 0.999."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum 0.9."""
    lr: float = 1e-3
    """Peak learning rate."""
    batch_size: int = 128
    """Samples per training step."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of training; by default what accelerate is configured to."""


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A baseline: replaces linear layers and convolutions by two thinner ones each."""

    name: ClassVar[str] = "low-rank"

    energy: float | None = None
    """Share of each layer's squared singular values that stays, 0..1. Give one of energy, rank, macs and params."""
    rank: int | None = None
    """One rank for all layers."""
    macs: float | None = None
    """Share of the multiply-accumulates that stays, 0..1."""
    params: float | None = None
    """Share of the parameters that stays, 0..1."""
    finetune: int = 0
    """Epochs of training after it; needs data."""
    lr: float = 1e-3
    """Peak learning rate of that training."""
    batch_size: int = 128
    """Samples per step of that training."""


@dataclass(frozen=True, kw_only=True)
class Unstructured:
    """A baseline: zeroes the smallest weights, and no tensor gets smaller."""

    name: ClassVar[str] = "unstructured"

    sparsity: float = 0.5
    """Share of the weights that becomes zero, 0..1."""
    scope: Literal["global", "layer"] = "global"
    """All weights compete, or every layer loses the same share."""
    finetune: int = 0
    """Epochs of training after it, which keeps the zeros; needs data."""
    lr: float = 1e-3
    """Peak learning rate of that training."""
    batch_size: int = 128
    """Samples per step of that training."""


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Adds early exits, trains them and chooses their thresholds; without data on inputs made out of the model."""

    name: ClassVar[str] = "convert"

    exits: int | Literal["every", "own", "search"] | tuple[str, ...] = 3
    """How many early exits, or the graph nodes they follow; every block, the model's own, those that a search keeps."""
    head: Literal["auto", "linear", "mlp", "attention", "copy", "cascade"] = "auto"
    """What the exits answer with."""
    recipe: TrainingRecipe = "distill"
    """How they are trained; each of its phases takes the epochs."""
    shots: int | None = None
    """Train on this many labelled samples per class only."""
    impressions: int = 1024
    """How many inputs are synthesised where there is no data."""
    epochs: int = 4
    """Passes over the training split."""
    lr: float = 1e-2
    """Peak learning rate of the new heads."""
    trunk_lr: float = 0.01
    """Learning rate of the trained layers, as a share of lr, where they are not frozen."""
    batch_size: int = 128
    """Samples per training step."""
    freeze_trunk: bool = True
    """Train the heads only: quicker, and the final exit stays exactly the static model."""
    rule: Literal["max-softmax", "entropy", "margin", "energy", "patience", "learned"] = "max-softmax"
    """Leave at the first exit that is sure: by its probabilities, agreement with those before, a learned score."""
    threshold_search: Literal["grid", "genetic", "quota"] | None = None
    """How thresholds are found; by default on a grid, genetic for patience and learned."""
    max_loss: float = 0.005
    """Accuracy, 0..1, that may be lost against the static model on the calibration split."""
    macs: float | None = None
    """Instead of max_loss a budget: mean MACs as a share of the static model's, 0..1."""
    risk: float | None = None
    """Instead of max_loss a rate, 0..1, promised for unseen data, such as 0.01, on half the calibration split."""
    confidence: float = 0.9
    """How sure that promise is, 0..1."""
    risk_of: Literal["disagreement", "accuracy-loss"] = "disagreement"
    """What is promised to be rare: other answers than the full model's, or accuracy lost against it."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of training; by default what accelerate is configured to."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Writes the model as one ONNX file and checks it in onnxruntime against PyTorch."""

    name: ClassVar[str] = "export"

    onnx: str = "model.onnx"
    """Name of the file, in the run folder."""


Step = Prune | Sparsify | LowRank | Unstructured | Convert | Export
STEPS: dict[str, type[Step]] = {kind.name: kind for kind in (Prune, Sparsify, LowRank, Unstructured, Convert, Export)}


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
        plain["steps"] = [{step.name: {k: _plain(v) for k, v in asdict(step).items()}} for step in self.steps]
        return yaml.safe_dump(plain, sort_keys=False, width=110)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, all defaults filled in.

    Args:
        overrides: "key=value" texts; the key is one of the recipe's own or "step.option", the value is YAML.

    Raises:
        RequestError: no such file, no YAML, unknown keys or options, values of another type.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
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
    return Recipe(steps=built, **_checked_values(_RECIPE_OPTIONS, own, where))


def _step(tree: Any, where: str) -> Step:
    name, options = (tree, {}) if isinstance(tree, str) else _single(tree, where)
    if name not in STEPS:
        raise RequestError(f"{where}: there is no step {name!r}: use one of {', '.join(STEPS)}")
    if options is not None and not isinstance(options, dict):
        raise RequestError(f"{where}.{name}: expected options such as {{key: value}}, got {options!r}")
    return STEPS[name](**_checked_values(_options(STEPS[name]), options or {}, f"{where}.{name}"))


def _single(tree: Any, where: str) -> tuple[Any, Any]:
    if not isinstance(tree, dict) or len(tree) != 1:
        raise RequestError(f"{where}: expected one step, such as 'prune: {{macs: 0.7}}', got {tree!r}")
    return next(iter(tree.items()))


def _options(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


_RECIPE_OPTIONS = {key: hint for key, hint in _options(Recipe).items() if key != "steps"}


def _checked_values(allowed: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in values:
        if key not in allowed:
            raise RequestError(f"{where}: unknown key {key!r}: use one of {', '.join(allowed)}")
    return {key: _checked(value, allowed[key], f"{where}: {key}") for key, value in values.items()}


def _checked(value: Any, hint: Any, where: str) -> Any:
    """The value as the hinted type: str, int, float, a choice, a list of such, or None."""
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
    if typing.get_origin(hint) is tuple:
        return f"a list of {_described(typing.get_args(hint)[0])}"
    return "null" if hint is type(None) else hint.__name__


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
        return replace(recipe, **_checked_values(_RECIPE_OPTIONS, {key: value}, f"--set {text}"))
    matches = [index for index, step in enumerate(recipe.steps) if step.name == name]
    if len(matches) != 1:
        found = "no step" if not matches else "more than one step"
        raise RequestError(f"--set {text}: the recipe has {found} {name!r}: edit the file")
    steps = list(recipe.steps)
    step = steps[matches[0]]
    changes = _checked_values(_options(type(step)), {option: value}, f"--set {text}")
    steps[matches[0]] = replace(step, **changes)
    return replace(recipe, steps=tuple(steps))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
