"""Draws exits.json as exits.png: accuracy against mean MACs of every recipe, the mean over the seeds that have it.

python benchmarks/exits_plot.py [--quick]
"""

import json
import math
from statistics import fmean
from typing import Any

from common import HERE, Benchmark
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BENCHMARK = Benchmark(__file__, __doc__)
COLUMNS = 4


def main() -> None:
    """A panel for each network."""
    BENCHMARK.start()
    networks = json.loads((HERE / "exits.json").read_text())["networks"]
    rows = math.ceil(len(networks) / COLUMNS)
    figure = Figure(figsize=(4.6 * COLUMNS, 4.2 * rows), dpi=100, layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for (name, seeds), axes in zip(networks.items(), panels, strict=False):
        draw(axes, name, list(seeds.values()))
    for axes in panels:  # what is left
        axes.remove()
    figure.savefig(BENCHMARK.folder / "exits.png")


def draw(axes: Axes, name: str, seeds: list[dict[str, Any]]) -> None:
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


if __name__ == "__main__":
    main()
