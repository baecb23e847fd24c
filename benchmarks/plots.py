"""Draws the results of exits.py, gates.py and the comparison with Torch-Pruning: exits.png, gates.png and so on.

python benchmarks/plots.py [--quick]
"""

import json
import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

from common import HERE, Benchmark
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BENCHMARK = Benchmark(__file__, __doc__)
COLUMNS = 4  # of panels, in exits.png
CURVES = {
    "skipnet": "supervised, then policy gradients",
    "no pretrain": "policy gradients alone",
    "untrained": "the same from random weights",
    "untrained no pretrain": "policy gradients alone, from random weights",
}
COLOURS = {"ours": "#2166ac", "torch_pruning": "#b2182b"}


def results(name: str) -> dict[str, Any]:
    """What a script has measured."""
    found: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text())
    return found


# --- exits: accuracy against mean MACs of every recipe, the mean over the seeds that have it -------------------------


def exits() -> Figure:
    """A panel for each network."""
    networks = results("exits")["networks"]
    rows = math.ceil(len(networks) / COLUMNS)
    figure = Figure(figsize=(4.6 * COLUMNS, 4.2 * rows), dpi=100, layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for (name, seeds), axes in zip(networks.items(), panels, strict=False):
        draw_recipes(axes, name, list(seeds.values()))
    for axes in panels:  # what is left
        axes.remove()
    return figure


def draw_recipes(axes: Axes, name: str, seeds: list[dict[str, Any]]) -> None:
    """One curve a recipe: budgets of MACs and, filled, the thresholds that may lose half a point."""
    axes.axhline(100 * fmean(rows["static"]["accuracy"] for rows in seeds), color="grey", ls="--", lw=1, label="static")
    for i, recipe in enumerate(dict.fromkeys(recipe for rows in seeds for recipe in rows if recipe != "static")):
        rows = [seed[recipe] for seed in seeds if recipe in seed]
        points = [mean_point(rows), *(mean_point([row["at_budget"][b] for row in rows]) for b in rows[0]["at_budget"])]
        label = recipe if len(rows) == 1 else f"{recipe}, {len(rows)} seeds"
        axes.plot(*zip(*sorted(points), strict=True), "o-", color=f"C{i}", mfc="white", label=label)
        axes.plot(*points[0], "o", color=f"C{i}", ms=8)
    axes.set(xlabel="mean MACs, share of the static network's", ylabel="test accuracy (%)", title=name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")


def mean_point(rows: list[dict[str, float]]) -> tuple[float, float]:
    """MACs, and accuracy in percent."""
    return fmean(row["mean_macs"] for row in rows), 100 * fmean(row["accuracy"] for row in rows)


# --- gates: accuracies at their MACs, and SkipNet's loss with and without its supervised half ------------------------


def gates() -> Figure:
    """One row of panels for each network that has all the ways of training."""
    networks = {name: rows for name, rows in results("gates")["networks"].items() if CURVES.keys() <= rows.keys()}
    figure = Figure(figsize=(10, 3.8 * len(networks)), dpi=130, layout="constrained")
    panels = figure.subplots(len(networks), 2, squeeze=False)
    for (name, rows), (left, right) in zip(networks.items(), panels, strict=True):
        draw_kinds(left, name, rows)
        draw_losses(right, rows)
    return figure


def draw_kinds(axes: Axes, name: str, rows: dict[str, Any]) -> None:
    """One line a row, the most accurate on top."""
    ranked = sorted(rows.items(), key=lambda item: item[1]["accuracy"])
    for i, (_, row) in enumerate(ranked):
        axes.plot(100 * row["accuracy"], i, "o", color="C0")
    axes.set_yticks(range(len(ranked)), [f"{kind} ({row['macs']:.2f} of the MACs)" for kind, row in ranked], fontsize=8)
    axes.set(xlabel="test accuracy (%)", title=name)
    axes.grid(axis="x", alpha=0.3)


def draw_losses(axes: Axes, rows: dict[str, Any]) -> None:
    """One curve a way of training; at the sixth epoch the supervised half is over, and gates are drawn."""
    for kind, label in CURVES.items():
        losses = rows[kind]["loss_by_epoch"]
        axes.plot(range(1, len(losses) + 1), losses, "o-", label=label)
    axes.set(xlabel="epoch", ylabel="training loss", title="SkipNet gates")
    axes.legend(fontsize=8)


# --- Torch-Pruning: seconds of both by model, where both manage it, and accuracy after fine-tuning by method ---------


def vs_torch_pruning() -> Figure:
    """Seconds left, accuracy right."""
    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_ratios(left, results("vs_torch_pruning")["summary"])
    draw_methods(right, results("vs_torch_pruning_accuracy")["summary"])
    return figure


def draw_ratios(axes: Axes, summary: dict[str, Any]) -> None:
    """One bar a model: seconds of ours over Torch-Pruning's; the dotted line is equal time."""
    axes.barh(list(summary["ratio"]), list(summary["ratio"].values()), color=COLOURS["ours"])
    axes.axvline(1, color="black", linestyle=":")
    axes.axvline(summary["median_ratio"], color="black", linewidth=1)
    managed = ", ".join(f"{side} {count}" for side, count in summary["managed"].items())
    axes.set_title(f"managed of {summary['of']} models: {managed}", fontsize=10)
    axes.set_xscale("log")
    axes.set_xlabel(f"seconds, ours / Torch-Pruning (median {summary['median_ratio']:.2f})")
    axes.tick_params(axis="y", labelsize=7)


def draw_methods(axes: Axes, summary: dict[str, Any]) -> None:
    """One bar a method, best on top; the dotted line is the network before pruning."""
    rows = {name: row["after"] for name, row in reversed(summary["methods"].items())}
    axes.barh(list(rows), list(rows.values()), color=[COLOURS[name.partition(":")[0]] for name in rows])
    axes.axvline(summary["unpruned"], color="black", linestyle=":")
    axes.set_xlim(min(rows.values()) - 0.01, max(summary["unpruned"], *rows.values()) + 0.005)
    axes.set_xlabel(f"accuracy after fine-tuning at half the MACs, mean of {summary['seeds']} seeds")
    axes.tick_params(axis="y", labelsize=7)


def main() -> None:
    """All three."""
    BENCHMARK.start()
    drawings: tuple[Callable[[], Figure], ...] = (exits, gates, vs_torch_pruning)
    for draw in drawings:
        draw().savefig(BENCHMARK.folder / f"{draw.__name__}.png")


if __name__ == "__main__":
    main()
