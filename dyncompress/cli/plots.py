"""The two pictures of a dynamic model: accuracy against MACs, and how many samples each exit answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SIZE = (6.4, 4.0)  # inches
_DPI = 150


def _figure() -> tuple[Any, Any]:
    # An own canvas: no display and no global state of pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def plot_curve(
    path: Path,
    curve: Sequence[tuple[float, float]],
    static: tuple[float, float],
    chosen: tuple[float, float],
) -> None:
    """Writes accuracy on the test split against mean MACs as PNG; every point is (MACs per sample, accuracy 0..1)."""
    figure, axes = _figure()
    axes.plot(
        [m / 1e6 for m, _ in curve], [100 * a for _, a in curve], "-", color="tab:blue", label="dynamic, any thresholds"
    )
    axes.plot(static[0] / 1e6, 100 * static[1], "s", color="black", label="static")
    axes.plot(chosen[0] / 1e6, 100 * chosen[1], "o", color="tab:red", markersize=8, label="dynamic, chosen")
    axes.set(xlabel="mean MACs per sample (M)", ylabel="test accuracy (%)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def plot_exits(path: Path, exits: Sequence[Mapping[str, Any]]) -> None:
    """Writes the share of samples that each exit answers as PNG; exits as in report.json."""
    figure, axes = _figure()
    labels = [f"exit {i + 1}\n{exit['macs'] / 1e6:.3g} M MACs" for i, exit in enumerate(exits)]
    bars = axes.bar(labels, [100 * exit["share"] for exit in exits], color="tab:blue")
    axes.bar_label(bars, [f"{100 * exit['share']:.1f} %" for exit in exits])
    axes.set(ylabel="samples answered (%)")
    axes.margins(y=0.12)
    figure.savefig(path)
