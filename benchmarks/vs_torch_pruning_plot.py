"""Draws both results of the comparison with Torch-Pruning.

python benchmarks/vs_torch_pruning_plot.py [--quick]      writes benchmarks/vs_torch_pruning.png
"""

import json
from typing import Any

from common import HERE, Benchmark
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BENCHMARK = Benchmark(__file__, __doc__)
COLOURS = {"ours": "#2166ac", "torch_pruning": "#b2182b"}


def main() -> None:
    """Left: seconds of both by model, where both manage it. Right: accuracy after fine-tuning by method."""
    BENCHMARK.start()
    structure = json.loads((HERE / "vs_torch_pruning.json").read_text())
    accuracy = json.loads((HERE / "vs_torch_pruning_accuracy.json").read_text())
    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_ratios(left, structure["summary"])
    draw_accuracy(right, accuracy["summary"])
    figure.savefig(BENCHMARK.folder / "vs_torch_pruning.png")


def draw_ratios(axes: Axes, summary: dict[str, Any]) -> None:
    """One bar a model: seconds of ours over Torch-Pruning's; the dotted line is equal time."""
    ratios = summary["ratio"]
    axes.barh(list(ratios), list(ratios.values()), color=COLOURS["ours"])
    axes.axvline(1, color="black", linestyle=":")
    axes.axvline(summary["median_ratio"], color="black", linewidth=1)
    managed = ", ".join(f"{side} {count}" for side, count in summary["managed"].items())
    axes.set_title(f"managed of {summary['of']} models: {managed}", fontsize=10)
    axes.set_xscale("log")
    axes.set_xlabel(f"seconds, ours / Torch-Pruning (median {summary['median_ratio']:.2f})")
    axes.tick_params(axis="y", labelsize=7)


def draw_accuracy(axes: Axes, summary: dict[str, Any]) -> None:
    """One bar a method, best on top; the dotted line is the network before pruning."""
    rows = {name: row["after"] for name, row in summary["methods"].items()}
    names = list(reversed(rows))
    colours = [COLOURS[name.partition(":")[0]] for name in names]
    axes.barh(names, [rows[name] for name in names], color=colours)
    axes.axvline(summary["unpruned"], color="black", linestyle=":")
    axes.set_xlim(min(rows.values()) - 0.01, max(summary["unpruned"], *rows.values()) + 0.005)
    axes.set_xlabel(f"accuracy after fine-tuning at half the MACs, mean of {summary['seeds']} seeds")
    axes.tick_params(axis="y", labelsize=7)


if __name__ == "__main__":
    main()
