"""What pruning did to each layer: shapes, MACs and the share that is kept, as rows, as CSV and as a table."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rich.table import Table
from torch import fx, nn

from ...passes.graph.cost import node_macs
from ...passes.graph.nodes import attribute
from . import tables

_SHOWN = 40


@dataclass(frozen=True)
class LayerChange:
    """A weight: its shapes, `after` None where the layer is gone, MACs per sample, and the share (0..1) of its numbers
    that is kept."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...] | None
    macs_before: int
    macs_after: int
    kept: float


def compare_layers(before: fx.GraphModule, after: fx.GraphModule) -> tuple[LayerChange, ...]:
    """One row per weight of two or more dims, in the model's order."""
    new, old_macs, new_macs = dict(after.named_parameters()), _macs_by_weight(before), _macs_by_weight(after)
    rows = []
    for name, old in before.named_parameters():
        if old.dim() > 1:
            shape = tuple(new[name].shape) if name in new else None
            kept = prod(shape) / old.numel() if shape is not None else 0.0
            macs = old_macs.get(name, 0), new_macs.get(name, 0)
            rows.append(LayerChange(name, tuple(old.shape), shape, *macs, kept))
    return tuple(rows)


def write_csv(path: Path, rows: Sequence[LayerChange]) -> None:
    """The rows as a CSV file; shapes as 64x3x7x7."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("name", "before", "after", "macs_before", "macs_after", "kept"))
        for row in rows:
            shapes = ("x".join(map(str, shape or ())) for shape in (row.before, row.after))
            writer.writerow((row.name, *shapes, row.macs_before, row.macs_after, f"{row.kept:.4f}"))


def table(rows: Sequence[LayerChange], verbose: bool) -> Table:
    """The rows for people: all of them, or those with the most MACs."""
    chosen = rows
    if not verbose and len(rows) > _SHOWN:
        least = sorted(row.macs_before for row in rows)[-_SHOWN]
        chosen = [row for row in rows if row.macs_before >= least][:_SHOWN]
    hidden = len(rows) - len(chosen)
    caption = f"... and {hidden} smaller ones: see --verbose, --json or layers.csv" if hidden else None
    result = Table("weight", "before", "after", "MACs", "kept", title="Layers", caption=caption)
    for column in result.columns[3:]:
        column.justify = "right"
    for row in chosen:
        shapes = (" x ".join(map(str, shape)) if shape else "gone" for shape in (row.before, row.after))
        macs = f"{tables.quantity(row.macs_before)} -> {tables.quantity(row.macs_after)}"
        result.add_row(row.name, *shapes, macs, f"{100 * row.kept:.0f} %")
    return result


def _macs_by_weight(gm: fx.GraphModule) -> dict[str, int]:
    """MACs per sample of the calls of each weight; a call with several divides its MACs by their sizes."""
    total: dict[str, int] = {}
    for node, macs in node_macs(gm).items():
        weights = {name: attribute(gm, name).numel() for name in _weights(gm, node)} if macs else {}
        for name, size in weights.items():
            total[name] = total.get(name, 0) + round(macs * size / sum(weights.values()))
    return total


def _weights(gm: fx.GraphModule, node: fx.Node) -> list[str]:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return [f"{node.target}.{name}" for name, p in module.named_parameters() if p.dim() > 1]
    sources = [str(source.target) for source in map(_source, node.all_input_nodes) if source.op == "get_attr"]
    return [name for name in sources if isinstance(attribute(gm, name), nn.Parameter) and attribute(gm, name).dim() > 1]


def _source(node: fx.Node) -> fx.Node:
    """Where a weight comes from that was transposed or reshaped on its way."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node
