"""Several models side by side on the same inputs."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from ...compress.evaluation.report_entries import measure
from ...compress.evaluation.reports import to_json
from ...compress.recipes.recipe import Recipe
from ...compress.training.batches import call
from ...errors import RequestError
from ...passes.graph.inputs import Inputs
from ...runtime.predict.dynamic import DynamicModel, graph_of
from ..loading.loaded_subject import Subject, load_splits, prepare
from ..report import gate_payoff, tables


def bench_models(recipes: Sequence[Recipe], console: Console, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Loads the models of the recipes (which share their data), measures them, prints a table, returns the report.

    Without data, all models are timed on the example inputs of the first. A model with skip gates is measured beside
    itself with every gate open.

    Raises RequestError for every mistake in the request.
    """
    data = load_splits(recipes[0])
    subjects = [prepare(recipe, data, allow_pickle=allow_pickle, one_of_many=len(recipes) > 1) for recipe in recipes]
    example = subjects[0].example_inputs
    for recipe, subject in zip(recipes, subjects, strict=True):
        _check_takes(recipe.model, subject, example)
    names = [f"{number} {recipe.model}" for number, recipe in enumerate(recipes, 1)]
    models = dict(zip(names, (subject.module for subject in subjects), strict=True))
    graphs = dict(zip(names, (subject.graph for subject in subjects), strict=True))
    opened: dict[str, str] = {}
    for number, (name, model) in enumerate(list(models.items()), 1):
        if isinstance(model, DynamicModel) and model.gates:
            opened[name] = f"{number}, every gate open"
            models[opened[name]] = whole = gate_payoff.opened(model)
            graphs[opened[name]] = graph_of(whole)
    entries = measure(models, graphs, example, data.test if data else None, subjects[0].device)
    device = str(subjects[0].device)
    console.print(tables.comparison(entries, f"on {recipes[0].data or 'random inputs'}, {device}"))
    shown = {
        name: {"name": recipe.model, **to_json(entries[name])} for name, recipe in zip(names, recipes, strict=True)
    }
    for name, other in opened.items():
        note = gate_payoff.does_not_pay(entries[name], entries[other], device)
        shown[name] |= {"open": to_json(entries[other]), "note": note}
        if note:
            console.print(f"{name}: {note}", soft_wrap=True, markup=False, highlight=False)
    return {"data": recipes[0].data, "device": device, "models": list(shown.values())}


def _check_takes(spec: str, subject: Subject, example_inputs: Inputs) -> None:
    try:
        with torch.no_grad():
            call(subject.module, example_inputs)
    except Exception as error:  # a model may fail in any way on inputs it was not made for
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(
            f"{spec} does not take the inputs of the first model ({reason}): bench them apart"
        ) from error
