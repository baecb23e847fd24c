"""A model as one ONNX file, checked on real samples where there are any."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import fx
from torch.utils.data import default_collate

from ...compress.evaluation.reports import to_json
from ...compress.recipes.recipe import Recipe
from ...compress.training.batches import size_of
from ...model_zoo.load_data import Splits
from ...runtime.onnx.check import BATCHES
from ...runtime.onnx.export import OnnxReport, export_onnx
from ...runtime.predict.dynamic import DynamicModel
from ..loading.loaded_subject import load_splits, prepare
from ..report import tables


@dataclass(frozen=True)
class OnnxCheck:
    """An ONNX file: its inputs and outputs, size, the largest error by batch size, and how many of the samples that
    were checked left at each exit, none for a static model."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    bytes: int
    max_error: dict[str, float]
    exits: tuple[int, ...]


def export_model(
    recipe: Recipe,
    path: Path,
    console: Console,
    *,
    tunable: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Loads the model of a recipe, writes it to `path`, prints what was checked and returns the same as a report.

    Raises RequestError for every mistake in the request, DynCompressError when the file is not what the model is.
    """
    data = load_splits(recipe)
    subject = prepare(recipe, data, allow_pickle=allow_pickle)
    written = write_onnx(subject.captured, path, data, tunable=tunable, overwrite=overwrite)
    check = check_of(written)
    show_check(check, console)
    console.print(f"onnx: {path}", soft_wrap=True, markup=False, highlight=False)
    return {"model": recipe.model, "onnx": str(path), "run_dir": None, "check": to_json(check)}


def write_onnx(
    model: fx.GraphModule | DynamicModel, path: Path, data: Splits | None, *, tunable: bool = False, overwrite: bool
) -> OnnxReport:
    """Writes the file and checks it: on test samples, or without data on random inputs."""
    samples = _samples(data) if data is not None else None
    return export_onnx(model, path, inputs=samples, tunable=tunable, overwrite=overwrite)


def _samples(data: Splits) -> Any:
    """As many test samples as the largest check takes, or all."""
    count = min(max(BATCHES), size_of(data.test, "test"))
    return default_collate([data.test[index][0] for index in range(count)])


def check_of(report: OnnxReport) -> OnnxCheck:
    """What the export says."""
    errors = {str(batch): error for batch, error in report.max_error.items()}
    inputs, outputs, exits = tuple(report.inputs), tuple(report.outputs), tuple(report.exits)
    return OnnxCheck(inputs, outputs, report.opset, report.bytes, errors, exits)


def show_check(check: OnnxCheck, console: Console) -> None:
    """Prints the check as a table."""
    cells = [("size", tables.quantity(check.bytes, "B")), ("opset", str(check.opset))]
    cells += [("inputs", ", ".join(check.inputs)), ("outputs", ", ".join(check.outputs))]
    cells += [(f"largest error, batch {batch}", f"{error:.2g}") for batch, error in check.max_error.items()]
    if check.exits:
        cells.append(("samples checked, by exit", ", ".join(map(str, check.exits))))
    console.print(tables.rows("ONNX, against PyTorch in onnxruntime", ("what", ""), cells))
