"""The picture of skip gates: which branches run, for which classes, and for easy and hard samples."""

from pathlib import Path
from typing import Any

import numpy as np

from ...compress.gates.gate_report import GateUse

Rates = tuple[tuple[float, ...], ...]

_DPI = 150
_CELL, _MARGIN, _LEGEND = 0.36, 1.9, 1.1  # inches: of one branch or class, beside the panels, and of the colour bar
_LEAST, _TALLEST, _WIDEST = 4.8, 30.0, 40.0  # inches
_NUMBERED = 16  # branches up to which every cell shows its number


def plot_gates(path: Path, report: GateUse) -> None:
    """Writes how often each branch runs as PNG: over all samples, from easy to hard ones, and by class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(report)
    branches = [name.removesuffix(":branch") for name in report.branches]
    heights = [len(rates) for _, rates in panels.values()]
    width = min(_WIDEST, max(_LEAST, _CELL * len(branches)) + _MARGIN + _LEGEND)
    height = min(_TALLEST, _CELL * (sum(heights) + len(panels)) + _MARGIN)
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, (names, rates)) in zip(grid, panels.items(), strict=True):
        image = axes.imshow(100 * np.array(rates), aspect="auto", cmap="Blues", vmin=0, vmax=100)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(title, fontsize=9, loc="left")
        if len(branches) <= _NUMBERED:
            _number(axes, rates)
    grid[-1].set_xticks(range(len(branches)), branches, fontsize=8, rotation=90)
    grid[-1].set_xlabel("branch, first to last")
    figure.colorbar(image, ax=list(grid), label="samples for which it runs (%)", aspect=30)
    figure.savefig(path)


def _panels(report: GateUse) -> dict[str, tuple[list[str], Rates]]:
    """By title: the names of the rows, and a rate for each row and branch."""
    hardness = [str(k) for k in range(1, len(report.by_hardness) + 1)]
    hardness[0], hardness[-1] = "surest", "least sure"
    panels: dict[str, tuple[list[str], Rates]] = {
        "all samples": (["all"], (report.open,)),
        "quarters, by how sure the static model is": (hardness, report.by_hardness),
    }
    if report.by_class is not None:
        panels["by class"] = ([str(c) for c in range(len(report.by_class))], report.by_class)
    return panels


def _number(axes: Any, rates: Rates) -> None:
    for i, row in enumerate(rates):
        for j, rate in enumerate(row):
            colour = "white" if rate > 0.6 else "black"
            axes.text(j, i, f"{100 * rate:.0f}", ha="center", va="center", fontsize=7, color=colour)
