"""Draws benchmarks/gates.json as gates.png: accuracy against MACs, and SkipNet's loss with and without pre-training.

python benchmarks/gates_plot.py
"""

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).with_name("gates.json")
CURVES = {"skipnet": "supervised, then policy gradients", "no pretrain": "policy gradients alone"}


def main() -> None:
    """One panel each for the first network."""
    result = json.loads(RESULTS.read_text())
    name, rows = next(iter(result["networks"].items()))
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for kind, row in rows.items():
        left.plot(row["macs"], 100 * row["accuracy"], "o")
        left.annotate(kind, (row["macs"], 100 * row["accuracy"]), xytext=(5, 4), textcoords="offset points", fontsize=8)
    left.set(xlabel="mean MACs, share of the static network's", ylabel="test accuracy (%)", title=name)
    left.margins(x=0.2, y=0.15)
    for kind, label in CURVES.items():
        if kind in rows:
            losses = rows[kind]["loss_by_epoch"]
            right.plot(range(1, len(losses) + 1), losses, "o-", label=label)
    right.set(xlabel="epoch", ylabel="training loss", title="SkipNet gates")
    right.legend()
    figure.savefig(RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
