"""Options are written once: names as in the registries, one default everywhere, flat names that lead back to groups."""

import ast
import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

import dyncompress as dc
from dyncompress.compress.exits.recipes import META, RECIPES
from dyncompress.compress.gates.gate_training import GATE_KINDS
from dyncompress.compress.importance.scores import IMPORTANCES
from dyncompress.compress.options import choices
from dyncompress.compress.options.flat import build, options_of, values_of
from dyncompress.compress.options.steps import STEPS, Compare, Convert, Gate, Options, Prune, Retrain, Sparsify
from dyncompress.compress.training.trainer import OPTIMIZERS
from dyncompress.passes.exits.head_choice import HEAD_KINDS
from dyncompress.passes.gates.insert_gates import GATES
from dyncompress.runtime.predict.policy import RULES, Fallback

MODELS = ("model", "small", "example_inputs")
KINDS_OF_STEPS = [*STEPS.values(), Compare]
VERBS: dict[type[Options], Callable[..., Any]] = {
    Prune: dc.prune,
    Sparsify: dc.sparsify,
    Retrain: dc.retrain,
    STEPS["low-rank"]: dc.low_rank,
    STEPS["unstructured"]: dc.prune_weights,
    Compare: dc.compare,
    Convert: dc.convert,
    Gate: dc.gate,
}


@pytest.mark.parametrize(
    ("names", "registry"),
    [
        (choices.Importance, IMPORTANCES),
        (choices.Head, HEAD_KINDS),
        (choices.ExitRecipe, (*RECIPES, META)),
        (choices.Rule, RULES),
        (choices.Fallback, get_args(Fallback)),
        (choices.GateKind, GATE_KINDS),
        (choices.GateNetwork, GATES),
        (choices.OptimizerName, OPTIMIZERS),
    ],
)
def test_names_are_those_of_the_registries(names: object, registry: Iterable[str]) -> None:
    assert sorted(get_args(names)) == sorted(registry)
    assert set(choices.WITHOUT_LABELS) < set(get_args(choices.ExitRecipe))


@pytest.mark.parametrize("kind", VERBS, ids=lambda kind: kind.name)
def test_a_verb_has_the_options_of_its_step(kind: type[Options]) -> None:
    """With the same defaults, but for `early`, which is a model there and its name here."""
    parameters = inspect.signature(VERBS[kind]).parameters
    step = kind()
    assert {f.name for f in fields(step)} <= set(parameters)
    for field in fields(step):
        if field.name != "early":
            assert parameters[field.name].default == getattr(step, field.name), field.name
    groups = [f.name for f in fields(step) if f.name not in options_of(kind)]
    everyday = [name for name in parameters if name not in (*groups, "run", *MODELS)]
    assert len(everyday) <= 8
    assert parameters["run"].default == dc.Run()


@pytest.mark.parametrize("kind", KINDS_OF_STEPS, ids=lambda kind: kind.name)
def test_flat_names_lead_back_to_the_groups(kind: type[Options]) -> None:
    step = kind()
    assert build(kind, values_of(step)) == build(kind, {}) == step
    assert all(option.help for option in options_of(kind).values())
    names = [name for f in fields(step) for name in _inner(step, f.name)]
    assert len(names) == len(set(names)), "two groups of a step have an option of one name"


def _inner(step: Options, field: str) -> list[str]:
    group = getattr(step, field)
    return [field] if field in options_of(type(step)) else [f.name for f in fields(group)]


def test_what_is_not_given_is_the_verbs_own_default() -> None:
    step = build(Convert, {"epochs": 8})
    assert step == Convert(training=dc.Training(epochs=8))
    assert (step.training.epochs, step.training.lr, step.training.trunk_lr) == (8, 1e-2, 0.01)
    assert Gate(training=dc.Training(epochs=8)).training.lr == 3e-3
    assert Prune(limits=dc.Limits(ignore=["fc"])).limits.ignore == ("fc",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Prune(training=dc.Training(epochs=3)), "epochs means nothing to prune: leave it out of Training"),
        (lambda: Sparsify(limits=dc.Limits(ceiling=0.5)), "ceiling means nothing to sparsify: leave it out of Limits"),
        (lambda: Convert(training=dc.Training(optimizer="sgd")), "optimizer means nothing to convert"),
        (lambda: dc.Limits(floor=2), "floor is a share"),
    ],
)
def test_what_means_nothing_to_a_verb_is_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(dc.RequestError, match=says):
        make()
    assert "epochs" not in options_of(Prune) and "ceiling" not in options_of(Sparsify)


def test_public_names_are_the_same_for_tools_that_read_types() -> None:
    tree = ast.parse(Path(dc.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    lines = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    read = {alias.asname: line.module for line in lines for alias in line.names}
    assert read == dc._HOMES
    assert all(hasattr(dc, name) for name in dc.__all__)
