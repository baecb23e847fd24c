"""What a model is made of: axes and why some are frozen, blocks, cut points, costs."""

from typing import Any

from rich.console import Console
from torch import fx

from ...compress.recipes.recipe import Recipe
from ...passes.axes.axes import Axes
from ...passes.edit.analysis import Analysis, analyse
from ...passes.gates.insert_gates import gate_places
from ...passes.gates.read_gates import graph_gates
from ...passes.graph.cost import count_bytes, count_parameters
from ...passes.graph.meta import exits_of
from ..loading.loaded_subject import load_splits, prepare
from ..report import tables


def inspect_model(recipe: Recipe, console: Console, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Loads the model of a recipe, prints what it is made of and returns the same as a report.

    Raises RequestError for every mistake in the request.
    """
    subject = prepare(recipe, load_splits(recipe), allow_pickle=allow_pickle)
    report = {"model": recipe.model, **describe(subject.graph)}
    _show(report, console)
    return report


def describe(gm: fx.GraphModule) -> dict[str, Any]:
    """Costs, axes, blocks, cut points and residual branches as plain numbers, text, lists and dicts.

    MACs are per sample; an axis' slices are [tensor, dim]; a cut point is named after the node it follows.
    """
    known = analyse(gm)
    return {
        "macs": known.total_macs,
        "parameters": count_parameters(gm),
        "bytes": count_bytes(gm),
        "axes": _axes(known.axes),
        "untyped": known.axes.untyped,
        "blocks": [
            {"start": b.start and b.start.node.name, "end": b.end.node.name, "nodes": len(b.nodes), "macs": b.macs}
            for b in known.blocks
        ],
        "cut_points": [
            {"at": c.node.name, "path": c.node.meta.get("path", ""), "single": c.single, "macs": c.macs}
            for c in known.cut_points
        ],
        "exits": list(exits_of(gm)),
        "branches": _branches(known),
    }


def _branches(known: Analysis) -> list[dict[str, Any]]:
    """Residual branches: those that a gate can skip, or skips already, with their MACs; and why others have none."""
    gates = graph_gates(known.gm)
    if gates:
        found = {gate.branch: gate.nodes for gate in gates}
        left: dict[str, str] = {}
    else:
        places, left = gate_places(known)
        found = {place.branch.name: place.branch.nodes for place in places}
    skippable = [
        {"name": b, "macs": sum(known.macs[n] for n in nodes), "gate": bool(gates), "reason": None}
        for b, nodes in found.items()
    ]
    return [*skippable, *({"name": b, "macs": None, "gate": False, "reason": reason} for b, reason in left.items())]


def _axes(axes: Axes) -> list[dict[str, Any]]:
    return [
        {
            "name": axis.name,
            "kind": axis.kind,
            "size": axis.size,
            "prunable": axis.prunable,
            "reason": axis.reason,
            "slices": [[s.tensor, s.dim] for s in axis.slices],
        }
        for axis in axes
    ]


def _show(report: dict[str, Any], console: Console) -> None:
    """Prints the report as tables."""
    prunable = [axis for axis in report["axes"] if axis["prunable"]]
    costs = f"{tables.quantity(report['macs'])} MACs per sample, {tables.quantity(report['parameters'])} parameters"
    size = tables.quantity(report["bytes"], "B")
    console.print(f"{report['model']}: {costs}, {size}, {len(prunable)} of {len(report['axes'])} axes can shrink")
    cells = [(a["name"], a["kind"], a["size"], len(a["slices"])) for a in prunable]
    console.print(tables.rows("Axes that can shrink", ("axis", "of", "size", "slices"), cells))
    console.print(tables.rows("Frozen axes", ("why", "axes", "such as"), _by_reason(report["axes"])))
    working = [b for b in report["blocks"] if b["macs"]]
    spans = [(b["start"] or "inputs", b["end"], b["nodes"], tables.quantity(b["macs"])) for b in working]
    console.print(tables.rows("Blocks that compute, between cut points", ("after", "up to", "nodes", "MACs"), spans))
    if report["branches"]:
        told = [(b["name"], tables.quantity(b["macs"]), _gate(b)) for b in report["branches"]]
        console.print(tables.rows("Residual branches", ("branch", "MACs", "a gate"), told))
    for node, reason in report["untyped"].items():
        console.print(f"not typed: {node}: {reason}", markup=False)


def _gate(branch: dict[str, Any]) -> str:
    if branch["reason"] is not None:
        return f"cannot skip it: {branch['reason']}"
    return "skips it" if branch["gate"] else "can skip it"


def _by_reason(axes: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    names: dict[str, list[str]] = {}
    for axis in axes:
        if not axis["prunable"]:
            names.setdefault(axis["reason"], []).append(axis["name"])
    return [(reason, len(found), found[0]) for reason, found in names.items()]
