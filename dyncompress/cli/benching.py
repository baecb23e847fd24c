"""Several models side by side on the same inputs."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from ..compress.batches import call
from ..compress.measure import measure
from ..errors import RequestError
from ..runtime.recipe import Recipe
from . import tables
from .subject import Subject, load_splits, prepare


def bench_models(recipes: Sequence[Recipe], console: Console, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Loads the models of the recipes (which share their data), measures them, prints a table, returns the report.

    Without data, all models are timed on the example inputs of the first.

    Raises RequestError for every mistake in the request.
    """
    data = load_splits(recipes[0])
    subjects = [prepare(recipe, data, allow_pickle=allow_pickle, one_of_many=len(recipes) > 1) for recipe in recipes]
    example = subjects[0].example_inputs
    for recipe, subject in zip(recipes, subjects, strict=True):
        _check_takes(recipe.model, subject, example)
    modules = {f"{number}": subject.module for number, subject in enumerate(subjects, 1)}
    graphs = {f"{number}": subject.graph for number, subject in enumerate(subjects, 1)}
    entries = measure(modules, graphs, example, data.test if data else None, subjects[0].device)
    names = [recipe.model for recipe in recipes]
    shown = {f"{number} {name}": entry for (number, entry), name in zip(entries.items(), names, strict=True)}
    where = f"on {recipes[0].data or 'random inputs'}, {subjects[0].device}"
    console.print(tables.comparison(shown, where))
    return {
        "data": recipes[0].data,
        "device": str(subjects[0].device),
        "models": [{"name": name, **entry} for name, entry in zip(names, entries.values(), strict=True)],
    }


def _check_takes(spec: str, subject: Subject, example_inputs: Any) -> None:
    try:
        with torch.no_grad():
            call(subject.module, example_inputs)
    except Exception as error:  # a model may fail in any way on inputs it was not made for
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(
            f"{spec} does not take the inputs of the first model ({reason}): bench them apart"
        ) from error
