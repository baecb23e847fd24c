"""Pictures: of a dynamic model, accuracy against MACs and how many samples each exit answers; of a pruned one, what was
kept; of a comparison, accuracy against wall clock."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...compress.evaluation.evaluate import ExitUse
from ...compress.pruning.compare import ComparedEntry
from ...compress.pruning.kept_indices import KeptAxis
from ...compress.thresholds.calibrate import Calibration

_SIZE = (6.4, 4.0)  # inches
_DPI = 150
_ROW, _TALLEST = 0.16, 30.0  # inches, of one axis and of a picture
_COLUMNS = 512
_TILE, _GAP, _ACROSS, _DOWN = 64, 4, 10, 20  # pixels of a synthesised input and around it; how many


def _figure(size: tuple[float, float] = _SIZE) -> tuple[Any, Any]:
    # An own canvas: no display and no global state of pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def plot_curve(
    path: Path,
    curve: Sequence[tuple[float, float]],
    before: tuple[float, float],
    chosen: tuple[float, float],
    name: str = "static",
) -> None:
    """Writes accuracy on the test split against mean MACs as PNG; every point is (MACs per sample, accuracy 0..1).

    before, name: the model that got the exits, and what it is called.
    """
    figure, axes = _figure()
    axes.plot(
        [m / 1e6 for m, _ in curve], [100 * a for _, a in curve], "-", color="tab:blue", label="dynamic, any thresholds"
    )
    axes.plot(before[0] / 1e6, 100 * before[1], "s", color="black", label=name)
    axes.plot(chosen[0] / 1e6, 100 * chosen[1], "o", color="tab:red", markersize=8, label="dynamic, chosen")
    axes.set(xlabel="mean MACs per sample (M)", ylabel="test accuracy (%)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def plot_methods(path: Path, entries: Mapping[str, ComparedEntry]) -> None:
    """Writes accuracy against the wall clock of one sample as PNG: a line per method, a point per share.

    entries: by name; method "static" is the original.
    """
    figure, axes = _figure()
    methods: dict[str, list[ComparedEntry]] = {}
    for entry in entries.values():
        methods.setdefault(entry.method, []).append(entry)
    for method, points in methods.items():
        ms, accuracy = [p.latency_ms["1"] for p in points], [100 * (p.accuracy or 0) for p in points]
        axes.plot(ms, accuracy, *(("ks",) if method == "static" else ("o-",)), label=method)
        for point, x, y in zip(points, ms, accuracy, strict=True):
            axes.annotate(f"{point.share:g}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="wall clock, one sample (ms)", ylabel="test accuracy (%)")
    axes.set_xlim(0, 1.1 * max(entry.latency_ms["1"] for entry in entries.values()))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def plot_exits(path: Path, exits: Sequence[ExitUse]) -> None:
    """Writes the share of samples that each exit answers as PNG."""
    figure, axes = _figure()
    labels = [f"exit {i + 1}\n{exit.macs / 1e6:.3g} M MACs" for i, exit in enumerate(exits)]
    shares = [100 * (exit.share or 0) for exit in exits]
    axes.bar_label(axes.bar(labels, shares, color="tab:blue"), [f"{share:.1f} %" for share in shares])
    axes.set(ylabel="samples answered (%)")
    axes.margins(y=0.12)
    figure.savefig(path)


def plot_reliability(path: Path, exits: Sequence[Calibration]) -> None:
    """Writes a reliability diagram per exit as PNG, before and after temperature scaling."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(exits), 3.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for k, (axes, fitted) in enumerate(zip(figure.subplots(1, len(exits), squeeze=False)[0], exits, strict=True)):
        axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
        before, after = ("before", fitted.before, fitted.ece_before), ("after", fitted.after, fitted.ece_after)
        for (when, bins, ece), colour in ((before, "tab:red"), (after, "tab:blue")):
            confidence, accuracy = [row.confidence for row in bins], [row.accuracy for row in bins]
            axes.plot(confidence, accuracy, "o-", color=colour, label=f"{when}, ECE {ece:.3f}")
        name = "output" if k + 1 == len(exits) else f"exit {k + 1}"
        axes.set(xlabel="confidence", title=f"{name}, T = {fitted.temperature:.2f}", xlim=(0, 1), ylim=(0, 1))
        axes.legend(loc="upper left", fontsize=7)
        axes.grid(alpha=0.3)
    figure.get_axes()[0].set_ylabel("accuracy on the calibration split")
    figure.savefig(path)


def plot_impressions(path: Path, inputs: Any, classes: Any) -> None:
    """Writes synthesised inputs as PNG, a row per class: up to 10 of each of the first 20 classes.

    inputs: (N, C, H, W) images, (N, H, W) maps or (N, F) rows, as an array; classes: (N,).
    """
    from matplotlib.image import imsave

    maps = inputs.reshape(len(inputs), 1, -1) if inputs.ndim == 2 else inputs
    if maps.ndim == 4:
        maps = maps.transpose(0, 2, 3, 1) if maps.shape[1] == 3 else maps.mean(1)
    low, high = np.quantile(maps, [0.01, 0.99])
    colours = np.clip((maps - low) / (high - low), 0, 1).reshape(*maps.shape[:3], -1) * np.ones(3)
    zoom = -(-_TILE // max(maps.shape[1:3]))
    tiles = colours.repeat(zoom, 1).repeat(zoom, 2)
    height, width = tiles.shape[1] + _GAP, tiles.shape[2] + _GAP
    rows = [np.flatnonzero(classes == label)[:_ACROSS] for label in np.unique(classes)[:_DOWN]]
    canvas = np.ones((height * len(rows), width * _ACROSS, 3))
    for i, row in enumerate(rows):
        for j, index in enumerate(row):
            canvas[i * height : (i + 1) * height - _GAP, j * width : (j + 1) * width - _GAP] = tiles[index]
    imsave(path, canvas)


def plot_kept(path: Path, kept: Mapping[str, KeptAxis]) -> None:
    """Writes which indices of each axis are kept as PNG: one bar code per axis, in network order, dark where kept.

    kept: by axis name. Branches are shown where one of them is gone.
    """
    gone = any(axis.kind == "branch" and not axis.kept for axis in kept.values())
    shown = {name: axis for name, axis in kept.items() if gone or axis.kind != "branch"}
    if not shown:
        return
    height = min(_TALLEST, 1.0 + _ROW * len(shown))
    figure, axes = _figure((8.0, height))
    codes = np.stack([_bar_code(axis.size, axis.kept) for axis in shown.values()])
    axes.imshow(codes, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    every = -(-len(shown) // int(_TALLEST / _ROW))
    labels = [f"{name}  {axis.kind} {len(axis.kept)}/{axis.size}" for name, axis in shown.items()]
    axes.set_yticks(range(0, len(shown), every), labels[::every], fontsize=6)
    axes.set_yticks([row - 0.5 for row in range(1, len(shown))], minor=True)
    axes.grid(which="minor", axis="y", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.set_xticks([])
    axes.set(xlabel="index of the axis, first to last; dark: kept", title="What was kept")
    figure.savefig(path)


def _bar_code(size: int, kept: Sequence[int]) -> Any:
    """The share kept at each of `_COLUMNS` places along an axis."""
    stays = np.zeros(size)
    stays[list(kept)] = 1
    fine = np.repeat(stays, _COLUMNS)  # every place is the mean of `size` entries of this
    return fine.reshape(_COLUMNS, size).mean(1)
