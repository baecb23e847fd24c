"""What the commands print for people: tables of models, exits, axes and blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ...compress.evaluation.evaluate import ExitUse
from ...compress.evaluation.report_entries import Entry
from ...compress.gates.gate_report import GateReport

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(value: float | None, unit: str = "") -> str:
    """1234567 is '1.23 M'; None, for what was not measured, is '-'."""
    if value is None:
        return "-"
    for size, prefix in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def percent(value: float | None) -> str:
    """0.9731 is '97.31 %'."""
    return "-" if value is None else f"{100 * value:.2f} %"


def comparison(entries: Mapping[str, Entry], title: str) -> Table:
    """One row per model; costs beside their share of the first model's."""
    table = Table("model", "accuracy", "MACs", "parameters", "size", title=title)
    first = next(iter(entries.values()))
    batches = list(first.latency_ms)
    for batch in batches:
        table.add_column(f"ms, batch {batch}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, entry in entries.items():
        cells = [
            percent(entry.accuracy),
            _shared(entry.macs_per_sample, first.macs_per_sample, ""),
            _shared(entry.parameters, first.parameters, ""),
            _shared(entry.bytes, first.bytes, "B"),
            *(_time(entry.latency_ms[batch], first.latency_ms[batch]) for batch in batches),
        ]
        table.add_row(name, *cells)
    return table


def _shared(value: float | None, first: float | None, unit: str) -> str:
    return quantity(value, unit) + _share(value, first)


def _time(ms: float, first: float) -> str:
    return (f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}") + _share(ms, first)


def _share(value: float | None, first: float | None) -> str:
    return "" if value is None or not first or value == first else f" ({100 * value / first:.0f} %)"


def exits(uses: Sequence[ExitUse], model: str) -> Table:
    """One row per exit: where it is, what a sample that leaves there has cost, how many do and how many are right."""
    table = Table("exit", "after", "MACs", "answers", "right", title=f"Exits of the {model} model")
    for column in table.columns[2:]:
        column.justify = "right"
    for index, use in enumerate(uses):
        shown = (quantity(use.macs), percent(use.share), percent(use.accuracy))
        table.add_row(str(index + 1), use.at, *shown)
    return table


def gates(done: GateReport, branch_macs: Sequence[int]) -> Table:
    """One row per branch that may be skipped: what it costs, and how often it runs, also by how sure samples are."""
    quarters = len(done.by_hardness)
    where = ["surest", *(f"quarter {k}" for k in range(2, quarters)), "least sure"]
    table = Table("branch", "MACs", "runs", *where, title=f"Skip gates ({done.kind}), on the calibration split")
    always, never = len(done.settled.always), len(done.settled.never)
    if always or never:
        table.caption = f"without a gate: {always} always run, {never} never did and are gone"
    for column in table.columns[1:]:
        column.justify = "right"
    for branch, macs, *rates in zip(done.branches, branch_macs, done.open, *done.by_hardness, strict=True):
        table.add_row(branch, quantity(macs), *map(percent, rates))
    return table


def rows(title: str, columns: Sequence[str], cells: Sequence[Sequence[Any]], limit: int = 40) -> Table:
    """A plain table of at most `limit` rows; its caption says how many are left out."""
    hidden = len(cells) - limit
    table = Table(*columns, title=title, caption=f"... and {hidden} more: see --json" if hidden > 0 else None)
    for row in cells[:limit]:
        table.add_row(*(str(cell) for cell in row))
    return table
