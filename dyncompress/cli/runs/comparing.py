"""Structured pruning beside its baselines: a run that compares them, its table, its picture and its models."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from ...compress.evaluation.reports import from_json, to_json
from ...compress.options.flat import values_of
from ...compress.options.steps import Compare
from ...compress.options.training_options import Run
from ...compress.pruning.compare import ComparedEntry, Comparison, compare
from ...compress.recipes.recipe import Recipe
from ...errors import RequestError
from ...passes.graph.meta import info_of
from ...runtime.files import checkpoint
from ...runtime.predict.dynamic import DynamicModel
from ..loading.loaded_subject import Subject, load_splits, prepare
from ..report import plots, tables
from . import folders
from .run_recipe import explained
from .run_report import entries_in


@dataclass(frozen=True, kw_only=True)
class SavedEntry(ComparedEntry):
    """A compared model and its file; None for the original, and for what runs on sparse kernels."""

    model: str | None


@dataclass(frozen=True, kw_only=True)
class CompareReport:
    """The compared models by name, and why a method could not reach a share; in JSON the models stand at the top."""

    model: str
    run_dir: str
    data: str | None
    device: str
    left_out: dict[str, str]
    entries: dict[str, SavedEntry]

    def to_json(self) -> dict[str, Any]:
        """As report.json holds it."""
        plain = to_json(self)
        entries = plain.pop("entries")
        return {**plain, "onnx": None, **entries}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "CompareReport":
        """Of a report.json."""
        return from_json(cls, {**plain, "entries": entries_in(plain)})


def compare_methods(
    recipe: Recipe,
    asked: Compare,
    folder: Path,
    console: Console,
    *,
    resume: bool = False,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Runs `compare` in a folder, prints its table, returns the report that it leaves there as report.json.

    Raises:
        RequestError: anything in the request that is wrong. DynCompressError: the training failed.
        Interrupted: Ctrl-C; the folder holds what is needed to resume.
    """
    if recipe.data is None:
        raise RequestError("compare trains and judges on data: give labelled data, such as --data digits")
    text = str(recipe) + yaml.safe_dump(
        {"compare": {k: list(v) if isinstance(v, tuple) else v for k, v in values_of(asked).items()}},
        sort_keys=False,
        default_flow_style=None,
    )
    if resume and (folder / folders.REPORT).exists():
        folders.begin(folder, text, resume=True)
        report = CompareReport.from_json(json.loads((folder / folders.REPORT).read_text(encoding="utf-8")))
        show(report, console)
        return report.to_json()
    subject = prepare(recipe, load_splits(recipe), allow_pickle=allow_pickle)
    if isinstance(subject.module, DynamicModel):
        raise RequestError(f"compare takes a static model, but {recipe.model} is dynamic")
    assert subject.data is not None
    folders.begin(folder, text, resume=resume)
    with explained(folder):
        found = compare(
            subject.graph, subject.data.train, subject.data.test,
            shares=asked.shares, finetune=asked.finetune, training=asked.training,
            run=Run(seed=recipe.seed, device=subject.device, run_dir=folder / folders.STEPS, resume=True),
        )  # fmt: skip
        report = _write(recipe, folder, found, subject)
    show(report, console)
    return report.to_json()


def _write(recipe: Recipe, folder: Path, found: Comparison, subject: Subject) -> CompareReport:
    entries = {name: SavedEntry(**vars(entry), model=None) for name, entry in found.entries.items()}
    for name, model in found.models.items():
        if name != "static":
            path = folder / f"{name}.safetensors"
            checkpoint.save(model, path, info={**info_of(model), "measured": to_json(found.entries[name])})
            entries[name] = replace(entries[name], model=str(path))
    report = CompareReport(
        model=recipe.model,
        run_dir=str(folder),
        data=recipe.data,
        device=str(subject.device),
        left_out=found.left_out,
        entries=entries,
    )
    plots.plot_methods(folder / "compare.png", entries)
    folders.finish(folder, report.to_json(), partial(show, report))
    return report


def show(report: CompareReport, console: Console) -> None:
    """Prints the report of a comparison."""
    console.print(tables.comparison(report.entries, f"on {report.data}, {report.device}"))
    for name, reason in report.left_out.items():
        console.print(f"left out: {name}: {escape(reason)}", highlight=False)
    console.print(f"models: {report.run_dir}", soft_wrap=True, markup=False, highlight=False)
