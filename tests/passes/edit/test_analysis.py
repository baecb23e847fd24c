"""One analysis of a graph: every part is what it is alone, made once, and handed on."""

from typing import Any

import pytest
import torch
from cases import graph

from dyncompress.passes.axes.axes import infer_axes
from dyncompress.passes.dims import type_graph as typing
from dyncompress.passes.edit import analysis
from dyncompress.passes.edit.analysis import analyse
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.passes.gates.insert_gates import InsertGates
from dyncompress.passes.graph.cost import count_macs, node_macs
from dyncompress.runtime.predict.dynamic import DynamicModel


def test_parts_are_what_they_are_alone() -> None:
    gm = graph("resnet")
    known = analyse(gm)
    assert known.gm is gm and known.macs == node_macs(gm) and known.total_macs == count_macs(gm)
    assert [axis.name for axis in known.axes] == [axis.name for axis in infer_axes(gm)]
    assert [b.name for b in known.branches] == [a.name for a in infer_axes(gm) if a.kind == "branch"]
    assert [b.end for b in known.blocks] == [p for p in known.cut_points if p.single]


def test_parts_are_made_once() -> None:
    known = analyse(graph("resnet"))
    for part in ("macs", "flow", "branches", "axes", "cut_points", "blocks"):
        assert getattr(known, part) is getattr(known, part)


@pytest.mark.parametrize(("name", "gates", "times"), [("resnet", False, 2), ("resnet", True, 3), ("vit", False, 2)])
def test_how_often_a_model_is_typed(name: str, gates: bool, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each pass that inserts, once for what is run; a head written operator by operator is not typed."""
    typed = []

    def counted(gm: Any) -> Any:
        typed.append(gm)
        return typing.type_graph(gm)

    monkeypatch.setattr(analysis, "type_graph", counted)
    torch.manual_seed(0)
    gm = InsertGates()(graph(name)).gm if gates else graph(name)
    DynamicModel(InsertExits(2)(gm).gm)
    assert len(typed) == times
