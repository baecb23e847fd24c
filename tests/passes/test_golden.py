"""The printed graph of small networks before and after each pass, as read and approved: `golden/PASS.txt`.

`python -m pytest tests/passes/test_golden.py --golden` writes the files anew; read what changed before it is committed.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from dyncompress.passes.capture.capture import capture
from dyncompress.passes.graph.cost import CAPTURE_BATCH
from dyncompress.passes.graph.nodes import attribute
from dyncompress.passes.pipeline import PASSES, Pipeline

FOLDER = Path(__file__).parent / "golden"


class Residual(nn.Module):
    """(B, 3, 8, 8) -> (B, 5): a residual block, then a map that is flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.inner, self.outer = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.fc(nn.functional.max_pool2d(x, 2).flatten(1))


class Stacked(nn.Module):
    """(B, 7, 3) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(3, 4, num_layers=2, dropout=0.1, batch_first=True), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[1][0][-1])


IMAGES, STEPS = torch.zeros(2, 3, 8, 8), torch.zeros(2, 7, 3)
# The pipelines whose last pass is the one looked at; what comes before it makes its input.
CASES = {
    "fold-batch-norm": (Residual, IMAGES, "- fold-batch-norm"),
    "low-rank": (Residual, IMAGES, "- low-rank: {rank: 2}"),
    "unstack-recurrent": (Stacked, STEPS, "- unstack-recurrent"),
    "shrink": (Residual, IMAGES, "- shrink: {keep: {'stem.weight:0': [0, 2, 3], 'inner.weight:0': [1]}}"),
    "insert-gates": (Residual, IMAGES, "- insert-gates"),
    "settle-gates": (Residual, IMAGES, "- insert-gates\n- settle-gates: {never: ['add:branch']}"),
    "remove-gates": (Residual, IMAGES, "- insert-gates\n- remove-gates"),
    "insert-exits": (Residual, IMAGES, "- insert-exits: {exits: [relu_2]}"),
    "keep-exits": (Residual, IMAGES, "- insert-exits: {exits: [relu, relu_2]}\n- keep-exits: {kept: [1]}"),
}


def printed(gm: fx.GraphModule) -> str:
    """One line per node: its name, the shape of what it gives (N is the batch), the call, and the layer called."""
    return "".join(f"{node.name}{_shape(node)} = {_call(gm, node)}\n" for node in gm.graph.nodes)


def _shape(node: fx.Node) -> str:
    val = node.meta.get("val")
    if not isinstance(val, Tensor):
        return ""
    return f" [{', '.join('N' if size == CAPTURE_BATCH else str(size) for size in val.shape)}]"


def _call(gm: fx.GraphModule, node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    args = ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])
    layer = attribute(gm, target) if node.op == "call_module" else ""
    return f"{target}({args})  {' '.join(str(layer).split())}".rstrip()


def test_every_pass_has_its_golden_text() -> None:
    assert set(CASES) == set(PASSES)


@pytest.mark.parametrize("name", CASES)
def test_graphs_are_as_approved(name: str, request: pytest.FixtureRequest) -> None:
    network, example, text = CASES[name]
    *first, last = Pipeline.parse(text).passes
    before = Pipeline(tuple(first))(capture(network().eval(), example).eval()).gm
    after = last(before)
    found = f"before:\n\n{printed(before)}\nafter {last}\n\n{printed(after.gm)}"
    path = FOLDER / f"{name}.txt"
    if request.config.getoption("--golden"):
        path.write_text(found, encoding="utf-8")
    assert last.name == name and after.modified
    assert found == path.read_text(encoding="utf-8")
