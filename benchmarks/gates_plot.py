"""Draws gates.json as gates.png: accuracies at their MACs, and SkipNet's loss with and without its supervised half.

python benchmarks/gates_plot.py [--quick]
"""

import json
from typing import Any

from common import HERE, Benchmark
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BENCHMARK = Benchmark(__file__, __doc__)
CURVES = {
    "skipnet": "supervised, then policy gradients",
    "no pretrain": "policy gradients alone",
    "untrained": "the same from random weights",
    "untrained no pretrain": "policy gradients alone, from random weights",
}


def main() -> None:
    """One row of panels for each network that has all the ways of training."""
    BENCHMARK.start()
    networks = json.loads((HERE / "gates.json").read_text())["networks"]
    networks = {name: rows for name, rows in networks.items() if CURVES.keys() <= rows.keys()}
    figure = Figure(figsize=(10, 3.8 * len(networks)), dpi=130, layout="constrained")
    panels = figure.subplots(len(networks), 2, squeeze=False)
    for (name, rows), (left, right) in zip(networks.items(), panels, strict=True):
        draw_accuracy(left, name, rows)
        draw_losses(right, rows)
    figure.savefig(BENCHMARK.folder / "gates.png")


def draw_accuracy(axes: Axes, name: str, rows: dict[str, Any]) -> None:
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


if __name__ == "__main__":
    main()
