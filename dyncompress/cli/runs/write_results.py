"""What a run leaves behind: the model, report.json, table.txt and the pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import fx

from ...compress.evaluation.report_entries import DynamicEntry, Entry
from ...compress.evaluation.reports import to_json
from ...compress.exits.convert_report import ConvertReport
from ...compress.gates.gate_report import GateReport
from ...compress.pruning.reports import PruneReport
from ...compress.recipes.recipe import Recipe
from ...compress.sparsity.sparsify_report import SparsifyReport
from ...compress.synthesis import impressions
from ...compress.thresholds.calibrate import Calibration
from ...compress.thresholds.policy_report import LatencyReport
from ...compress.thresholds.risk import Promise
from ...passes.graph.meta import info_of
from ...runtime.files import checkpoint
from ...runtime.onnx.export import OnnxReport
from ...runtime.predict.dynamic import DynamicModel, graph_of
from ..loading.loaded_subject import Subject
from ..report import gate_payoff, gate_plots, layers, plots, tables
from ..report.exit_curve import tradeoff
from . import folders
from .exporting import check_of, show_check
from .run_report import GateSummary, LeavingSummary, RunReport

Captured = fx.GraphModule | DynamicModel


def write(
    recipe: Recipe,
    folder: Path,
    models: Mapping[str, Captured],
    entries: dict[str, Entry],
    onnx: OnnxReport | None,
    subject: Subject,
) -> RunReport:
    """Writes everything into the folder, removes what only resuming needed, and returns the report.

    `entries` hold one entry per model.
    """
    name, result = list(models.items())[-1]
    path = _save(recipe, folder, result, entries[name]) if len(models) > 1 else None
    report = RunReport(
        model=str(path or recipe.model),
        run_dir=str(folder),
        data=recipe.data,
        device=str(subject.device),
        onnx=None if onnx is None else str(onnx.path),
        entries=entries,
        check=None if onnx is None else check_of(onnx),
        **_shrinking(models, folder),
        gate=_gates(models, entries, folder, str(subject.device)),
        leaving=_leaving(models, subject),
    )
    if report.leaving is not None:
        _draw(folder, report, next(iter(models)), name, ConvertReport.of(result).exits)
    for stored in (folder / folders.STEPS).glob(f"*/{impressions.FILE}"):
        made = impressions.read_impressions(stored)
        plots.plot_impressions(folder / "impressions.png", made.inputs.numpy(), made.classes.numpy())
    folders.finish(folder, report.to_json(), partial(show, report, verbose=True))
    return report


def _save(recipe: Recipe, folder: Path, model: Captured, entry: Entry) -> Path:
    """The result with what was measured of it, and the recipe, in its file."""
    path = folder / ("model.dyn.safetensors" if isinstance(model, DynamicModel) else "model.safetensors")
    info = {**info_of(graph_of(model)), "recipe": str(recipe), "measured": to_json(entry)}
    checkpoint.save(model, path, info=info, overwrite=True)
    return path


_SHRUNK_BY: dict[str, type[PruneReport | SparsifyReport]] = {"pruned": PruneReport, "sparsified": SparsifyReport}


def _shrinking(models: Mapping[str, Captured], folder: Path) -> dict[str, Any]:
    """What the first pruning or sparsifying did: the layers, the shares reached, a picture of what was kept."""
    name = next((other for other in models if other in _SHRUNK_BY), None)
    if name is None:
        return {}
    done = _SHRUNK_BY[name].of(models[name])
    changes = layers.compare_layers(graph_of(models["static"]), graph_of(models[name]))
    layers.write_csv(folder / "layers.csv", changes)
    plots.plot_kept(folder / "kept.png", done.kept)
    return {"layers": changes, done.verb: replace(done, kept={})}


def _gates(
    models: Mapping[str, Captured], entries: Mapping[str, Entry], folder: Path, device: str
) -> GateSummary | None:
    """How often each branch runs, in numbers and as a picture, and whether skipping pays here."""
    names, gated = list(models), models.get("gated")
    if not isinstance(gated, DynamicModel) or names[0] == "gated":
        return None
    done, before = GateReport.of(gated), entries[names[names.index("gated") - 1]]
    gate_plots.plot_gates(folder / "gates.png", done)
    note = gate_payoff.does_not_pay(entries["gated"], before, device)
    return GateSummary(**{**vars(done), "history": ()}, branch_macs=tuple(gated.branch_macs), note=note)


def _leaving(models: Mapping[str, Captured], subject: Subject) -> LeavingSummary | None:
    """What the exits of the result do, if the run has made them."""
    result = list(models.values())[-1]
    made = len(models) > 1 and isinstance(result, DynamicModel) and result.exits and not result.per_position
    if not made or subject.data is None:
        return None
    assert isinstance(result, DynamicModel)
    curve, done = tradeoff(result, subject.data, subject.device), ConvertReport.of(result)
    return LeavingSummary(curve=curve, risk=done.risk, exit_costs=done.latency)


def _draw(folder: Path, report: RunReport, first: str, name: str, calibrated: Sequence[Calibration]) -> None:
    before, dynamic = report.entries[first], report.entries[name]
    assert report.leaving is not None and isinstance(dynamic, DynamicEntry)
    curve = [(point.mean_macs, point.accuracy) for point in report.leaving.curve]
    plots.plot_curve(folder / "curve.png", curve, _point(before), _point(dynamic), first)
    plots.plot_exits(folder / "exits.png", dynamic.exits)
    plots.plot_reliability(folder / "reliability.png", calibrated)


def _point(entry: Entry) -> tuple[float, float]:
    """MACs per sample and accuracy of a model that was judged on data."""
    assert entry.macs_per_sample is not None and entry.accuracy is not None
    return entry.macs_per_sample, entry.accuracy


def show(report: RunReport, console: Console, *, verbose: bool = False) -> None:
    """Prints a report as tables; `verbose`: every layer of a large model."""
    if report.layers is not None:
        console.print(layers.table(report.layers, verbose))
    for line in (*_shares(report.prune), *_learned(report.sparsify)):
        console.print(line)
    for name, entry in report.entries.items():
        if isinstance(entry, DynamicEntry) and len(entry.exits) > 1:
            console.print(tables.exits(entry.exits, name))
    if report.gate is not None:
        console.print(tables.gates(report.gate, report.gate.branch_macs))
    console.print(tables.comparison(report.entries, f"on {report.data or 'no data'}, {report.device}"))
    if report.gate is not None and report.gate.note:
        console.print(report.gate.note, soft_wrap=True, highlight=False)
    if report.leaving is not None and report.leaving.risk is not None:
        console.print(_promise(report.leaving.risk))
    if report.leaving is not None and report.leaving.exit_costs is not None:
        console.print(_expected(report.leaving.exit_costs))
    if report.check is not None:
        show_check(report.check, console)
    console.print(f"model: {report.model}", soft_wrap=True, markup=False, highlight=False)
    if report.onnx:
        console.print(f"onnx: {report.onnx}", soft_wrap=True, markup=False, highlight=False)


def _expected(costs: LatencyReport) -> str:
    """One line: what thresholds were chosen by, in milliseconds per sample."""
    heads = ", ".join(f"{ms:.2g}" for ms in costs.heads_ms)
    text = f"thresholds by ms per sample at batch {costs.batch}: {costs.mean_ms:.3g} expected"
    return f"{text}, static {costs.static_ms:.3g}; asking each exit takes {heads}"


def _promise(risk: Promise) -> str:
    """One line: what holds for unseen data, and how sure that is."""
    text = f"{risk.loss} at most {risk.risk:g} with confidence {risk.confidence:g}"
    return f"{text}: {risk.observed:.4f} seen on {risk.samples} samples, step {risk.step} of {risk.steps}"


def _shares(done: PruneReport | None) -> list[str]:
    """One line per cut: what was asked for and what is left."""
    if done is None:
        return []
    lines = []
    for number, step in enumerate(done.steps, 1):
        text = f"cut {number}: {step.left:.3f} of the {done.metric} is left, {step.goal:.3f} was asked for"
        if step.measured is not None:
            text += f" (this cut: {step.measured:.3f} measured, {step.predicted:.3f} predicted)"
        lines.append(text)
    return lines


def _learned(done: SparsifyReport | None) -> list[str]:
    """One line per surgery, and one for what was learned and what was cut."""
    if done is None:
        return []
    lines = [
        f"after epoch {step.epoch}: {step.live} of {step.groups} groups, {step.left:.3f} of the {done.metric}"
        for step in done.surgeries
    ]
    asked = f", {done.target:.3f} was asked for" if done.target is not None else ""
    cut = f", {done.learned - done.left:.3f} cut" if done.learned > done.left else ""
    return [*lines, f"{done.left:.3f} of the {done.metric} is left{asked}: {1 - done.learned:.3f} learned{cut}"]
