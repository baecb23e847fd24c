"""A run: take the steps of a recipe one by one, measure every model that came out, write the report.

A finished step's model waits in the run folder, so that an interrupted run goes on where it stopped.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import fx

from ...compress.evaluation.report_entries import measure
from ...compress.options.steps import Export
from ...compress.options.training_options import Run
from ...compress.recipes.recipe import Recipe, read_recipe
from ...compress.recipes.take_step import check_order, check_request, result_name, take
from ...errors import DynCompressError, RequestError
from ...runtime.files import checkpoint
from ...runtime.onnx.export import OnnxReport
from ...runtime.predict.dynamic import DynamicModel, graph_of
from ..loading.loaded_subject import Subject, capture_named, load_splits, prepare
from . import folders, write_results
from .exporting import write_onnx
from .run_report import RunReport

Captured = fx.GraphModule | DynamicModel


def run_recipe(
    recipe: Recipe | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    status: Console | None = None,
) -> RunReport:
    """Runs a recipe in a folder and returns the report that it leaves there as report.json.

    Args:
        recipe: a recipe, or the path of its YAML file.
        folder: made where it is not there; beside the report it then holds the model, the recipe, tables and pictures.
        resume: go on with the run in `folder`, if there is one. overwrite: replace it.
        allow_pickle: whether the model may be unpickled, which runs code from its file.
        status: where progress is told; None = nowhere.

    Raises:
        RequestError: anything in the request that is wrong. DynCompressError: a step failed.
        Interrupted: Ctrl-C; the folder holds what is needed to resume.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    folder = Path(folder)
    folders.check_free(folder, resume=resume, overwrite=overwrite)
    if resume and (folder / folders.REPORT).exists():
        folders.begin(folder, str(recipe), resume=True)
        return RunReport.from_json(json.loads((folder / folders.REPORT).read_text(encoding="utf-8")))
    status = status or Console(quiet=True)
    check_request(recipe.steps, recipe.data)
    status.print(f"loading {recipe.model}" + (f" and {recipe.data}" if recipe.data else ""), markup=False)
    subject = prepare(recipe, load_splits(recipe), allow_pickle=allow_pickle)
    check_order(recipe.steps, subject.module)
    if not subject.trained:
        status.print(f"note: {recipe.model} has random weights", markup=False)
    folders.begin(folder, str(recipe), resume=resume)
    with explained(folder):
        captured, written = _take_steps(recipe, subject, folder, status)
        status.print("measuring accuracy and wall clock")
        graphs = {name: graph_of(model) for name, model in captured.items()}
        models = {**captured, next(iter(captured)): subject.module}  # the first is timed as the user has it
        test = subject.data.test if subject.data is not None else None
        entries = measure(models, graphs, subject.example_inputs, test, subject.device)
        return write_results.write(recipe, folder, captured, entries, written, subject)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """What stops a run in `folder`, in the user's words; a wrong request leaves no folder behind."""
    try:
        yield
    except RequestError:
        folders.abandon(folder)
        raise
    except KeyboardInterrupt:
        raise folders.Interrupted(folder) from None
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise DynCompressError(f"out of memory ({reason}): give a smaller batch_size or another device") from error


def _take_steps(
    recipe: Recipe, subject: Subject, folder: Path, status: Console
) -> tuple[dict[str, Captured], OnnxReport | None]:
    """Every model to compare, by its name in the report, and the ONNX file."""
    current: Any = subject.captured
    written: OnnxReport | None = None
    models: dict[str, Captured] = {_first_name(current): current}
    for number, step in enumerate(recipe.steps, 1):
        status.print(f"step {number} of {len(recipe.steps)}: {step.name}")
        if isinstance(step, Export):
            written = write_onnx(current, folder / step.onnx, subject.data, overwrite=True)
            continue
        work = folder / folders.STEPS / f"{number}-{step.name}"
        saved = work.with_suffix(".safetensors")
        if saved.exists():
            current = checkpoint.load(saved).to(subject.device)
        else:
            work.mkdir(parents=True, exist_ok=True)
            progress = False if status.quiet else None
            current = take(
                step,
                current,
                subject.data,
                example_inputs=subject.example_inputs,
                load=partial(capture_named, subject),
                run=Run(seed=recipe.seed, device=subject.device, run_dir=work, resume=True, progress=progress),
            )
            checkpoint.save(current, saved)
        models[_free_name(result_name(step), models)] = current
    return models, written


def _first_name(model: Captured) -> str:
    if not isinstance(model, DynamicModel):
        return "static"
    return "dynamic" if model.exits else "gated"


def _free_name(name: str, models: Iterable[str]) -> str:
    taken = sum(other == name or other.startswith(f"{name}-") for other in models)
    return f"{name}-{taken + 1}" if taken else name
