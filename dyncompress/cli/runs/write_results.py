"""What a run leaves behind: the model, report.json, table.txt and the pictures."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import fx

from ...passes.graph.meta import info_of
from ...compress.synthesis import impressions
from ...runtime.predict.dynamic import graph_of
from ...runtime.files import checkpoint
from ...runtime.predict.dynamic import DynamicModel
from ...compress.recipes.recipe import Recipe
from . import folders
from ..report import gate_payoff, gate_plots, layers, plots, tables
from .exporting import show_check
from ..loading.loaded_subject import Subject
from ..report.exit_curve import tradeoff

TABLE = "table.txt"
_TABLE_WIDTH = 120


def write(
    recipe: Recipe,
    folder: Path,
    models: Mapping[str, fx.GraphModule | DynamicModel],
    measured: Mapping[str, Any],
    subject: Subject,
) -> dict[str, Any]:
    """Writes everything into the folder, removes what only resuming needed, and returns the report.

    `measured` holds an entry per model and what is known of the ONNX file.
    """
    entries = entries_of(measured)
    name, result = list(models.items())[-1]
    path = _save(recipe, folder, result, entries[name]) if len(models) > 1 else None
    report: dict[str, Any] = {
        "model": str(path or recipe.model),
        "run_dir": str(folder),
        "data": recipe.data,
        "device": str(subject.device),
        **measured,
    }
    shrunk = next((other for other in models if other in _SHRUNK_BY), None)
    if shrunk is not None:
        _note_shrinking(report, models, shrunk, folder)
    first = next(iter(models))
    if "gated" in models and first != "gated":
        _note_gates(report, models, folder)
    if (
        name != first
        and isinstance(result, DynamicModel)
        and result.exits
        and not result.per_position
        and subject.data is not None
    ):
        report["curve"] = tradeoff(result, subject.data, subject.device)
        done = info_of(result.trunk)["convert"]
        report["risk"], report["exit_costs"] = done["risk"], done["latency"]
        _draw(folder, report, first, name, done["exits"])
    for path in (folder / folders.STEPS).glob(f"*/{impressions.FILE}"):
        made = impressions.read_impressions(path)
        plots.plot_impressions(folder / "impressions.png", made.inputs.numpy(), made.classes.numpy())
    with (folder / TABLE).open("w", encoding="utf-8") as file:
        show(report, Console(file=file, width=_TABLE_WIDTH), verbose=True)
    (folder / folders.REPORT).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    shutil.rmtree(folder / folders.STEPS, ignore_errors=True)
    return report


def _save(recipe: Recipe, folder: Path, model: fx.GraphModule | DynamicModel, entry: dict[str, Any]) -> Path:
    """The result with what was measured of it, and the recipe, in its file."""
    path = folder / ("model.dyn.safetensors" if isinstance(model, DynamicModel) else "model.safetensors")
    info = {**info_of(graph_of(model)), "recipe": str(recipe), "measured": entry}
    checkpoint.save(model, path, info=info, overwrite=True)
    return path


_SHRUNK_BY = {"pruned": "prune", "sparsified": "sparsify"}


def _note_shrinking(report: dict[str, Any], models: Mapping[str, Any], name: str, folder: Path) -> None:
    """What the first pruning or sparsifying did: the layers, the shares reached, a picture of what was kept."""
    done = info_of(models[name])[_SHRUNK_BY[name]]
    report["layers"] = layers.compare_layers(models["static"], models[name])
    report[_SHRUNK_BY[name]] = {key: value for key, value in done.items() if key != "kept"}
    layers.write_csv(folder / "layers.csv", report["layers"])
    plots.plot_kept(folder / "kept.png", done["kept"])


def _note_gates(report: dict[str, Any], models: Mapping[str, Any], folder: Path) -> None:
    """How often each branch runs, in numbers and as a picture, and whether skipping pays here."""
    done, names = info_of(models["gated"].trunk)["gate"], list(models)
    before = report[names[names.index("gated") - 1]]
    report["gate"] = {key: value for key, value in done.items() if key != "history"}
    report["gate"]["branch_macs"] = models["gated"].branch_macs
    report["gate"]["note"] = gate_payoff.does_not_pay(report["gated"], before, report["device"])
    gate_plots.plot_gates(folder / "gates.png", done)


def _draw(folder: Path, report: dict[str, Any], first: str, name: str, calibrated: Sequence[Mapping[str, Any]]) -> None:
    before, dynamic = report[first], report[name]
    plots.plot_curve(
        folder / "curve.png",
        [(point["mean_macs"], point["accuracy"]) for point in report["curve"]],
        (before["mean_macs" if "mean_macs" in before else "macs"], before["accuracy"]),
        (dynamic["mean_macs"], dynamic["accuracy"]),
        first,
    )
    plots.plot_exits(folder / "exits.png", dynamic["exits"])
    plots.plot_reliability(folder / "reliability.png", calibrated)


def entries_of(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The compared models of a report, by name."""
    return {name: value for name, value in report.items() if isinstance(value, dict) and "latency_ms" in value}


def show(report: Mapping[str, Any], console: Console, *, verbose: bool = False) -> None:
    """Prints a report as tables; `verbose`: every layer of a large model."""
    entries = entries_of(report)
    if "layers" in report:
        console.print(layers.table(report["layers"], verbose))
        for line in _shares(report["prune"]) if "prune" in report else _learned(report["sparsify"]):
            console.print(line)
    for name, entry in entries.items():
        if len(entry.get("exits", ())) > 1:
            console.print(tables.exits(entry["exits"], name))
    if "gate" in report:
        console.print(tables.gates(report["gate"]))
    console.print(tables.comparison(entries, f"on {report['data'] or 'no data'}, {report['device']}"))
    if report.get("gate", {}).get("note"):
        console.print(report["gate"]["note"], soft_wrap=True, highlight=False)
    if report.get("risk"):
        console.print(_promise(report["risk"]))
    if report.get("exit_costs"):
        console.print(_expected(report["exit_costs"]))
    if "check" in report:
        show_check(report["check"], console)
    console.print(f"model: {report['model']}", soft_wrap=True, markup=False, highlight=False)
    if report["onnx"]:
        console.print(f"onnx: {report['onnx']}", soft_wrap=True, markup=False, highlight=False)


def _expected(costs: Mapping[str, Any]) -> str:
    """One line: what thresholds were chosen by, in milliseconds per sample."""
    heads = ", ".join(f"{ms:.2g}" for ms in costs["heads_ms"])
    text = f"thresholds by ms per sample at batch {costs['batch']}: {costs['mean_ms']:.3g} expected"
    return f"{text}, static {costs['static_ms']:.3g}; asking each exit takes {heads}"


def _promise(risk: Mapping[str, Any]) -> str:
    """One line: what holds for unseen data, and how sure that is."""
    text = f"{risk['loss']} at most {risk['risk']:g} with confidence {risk['confidence']:g}"
    return f"{text}: {risk['observed']:.4f} seen on {risk['samples']} samples, step {risk['step']} of {risk['steps']}"


def _shares(done: Mapping[str, Any]) -> list[str]:
    """One line per cut: what was asked for and what is left."""
    lines = []
    for number, step in enumerate(done["steps"], 1):
        text = f"cut {number}: {step['left']:.3f} of the {done['metric']} is left, {step['goal']:.3f} was asked for"
        if done["metric"] == "latency":
            text += f" (this cut: {step['measured']:.3f} measured, {step['predicted']:.3f} predicted)"
        lines.append(text)
    return lines


def _learned(done: Mapping[str, Any]) -> list[str]:
    """One line per surgery, and one for what was learned and what was cut."""
    metric = done["metric"]
    lines = [
        f"after epoch {step['epoch']}: {step['live']} of {step['groups']} groups, {step['left']:.3f} of the {metric}"
        for step in done["surgeries"]
    ]
    asked = f", {done['target']:.3f} was asked for" if done["target"] is not None else ""
    cut = f", {done['learned'] - done['left']:.3f} cut" if done["learned"] > done["left"] else ""
    return [*lines, f"{done['left']:.3f} of the {metric} is left{asked}: {1 - done['learned']:.3f} learned{cut}"]
