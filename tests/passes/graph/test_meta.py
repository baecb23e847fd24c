"""What a captured graph knows about itself is read and written in one place, and absent where it is not there."""

import ast
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import dyncompress as dc
from dyncompress.passes.exits.keep_exits import KeepExits
from dyncompress.passes.gates.remove_gates import RemoveGates
from dyncompress.passes.graph import meta

PACKAGE = Path(dc.__file__).parent
KEYS = {"inputs", "exits", "gates", "info"}

pytestmark = pytest.mark.filterwarnings("ignore:the .* gates cost")  # the model is tiny


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = x + torch.relu(self.inner(x))
        return self.last(x)


def captured() -> fx.GraphModule:
    return dc.capture(Net().eval(), (torch.randn(2, 4), True))


def test_no_other_file_names_its_keys() -> None:
    """`meta["exits"]`, `meta.get("exits")` and `"exits" in meta`, of whatever object."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Subscript):
                read, key = node.value, node.slice
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                read, key = node.func.value, node.args[0]
            elif isinstance(node, ast.Compare):
                read, key = node.comparators[0], node.left
            else:
                continue
            named = isinstance(key, ast.Constant) and key.value in KEYS
            if named and isinstance(read, ast.Attribute) and read.attr == "meta":
                found.append(f"{path}:{node.lineno}")
    assert not found


def test_inputs_are_known_and_the_rest_is_absent() -> None:
    gm = captured()
    assert meta.is_captured(gm) and not meta.is_captured(Net())
    x, twice = meta.inputs_of(gm)
    assert isinstance(x, meta.TensorInput) and (x.name, x.shape[1:], x.dynamic) == ("x", (4,), (0,))
    assert x.dtype == torch.float32 and x.per_sample and x.sized(5) == [5, 4]
    assert twice == meta.FixedInput("twice", True) and not twice.per_sample
    assert meta.exits_of(gm) == meta.gates_of(gm) == () and not meta.is_dynamic(gm) and meta.info_of(gm) == {}


def test_what_is_there_comes_back_from_plain_values() -> None:
    gm = dc.InsertExits(1)(dc.InsertGates()(captured()).gm).gm
    other = fx.GraphModule(nn.Module(), fx.Graph())
    meta.read_meta(other, meta.plain_meta(gm))
    assert other.meta == gm.meta and meta.is_dynamic(other)
    with pytest.raises(dc.RequestError, match="unknown dtype 'load'"):
        meta.read_meta(other, {"inputs": [{"name": "x", "shape": [2], "dtype": "load", "dynamic": []}]})


def test_without_exits_and_gates_a_graph_answers_as_a_static_one() -> None:
    gm, x = captured(), torch.randn(3, 4)
    early, gated = dc.InsertExits(1)(gm).gm, dc.InsertGates()(gm).gm
    with torch.no_grad():
        expected = gm(x, True)
        for plain in (KeepExits()(early).gm, RemoveGates()(gated).gm):
            assert not meta.is_dynamic(plain) and torch.equal(plain(x, True), expected)
        gated_exit = dc.InsertExits(1)(gated).gm
        for still in (KeepExits()(gated_exit).gm, RemoveGates()(gated_exit).gm, early, gated):
            assert meta.is_dynamic(still) and isinstance(still(x, True), tuple)
