"""Pipelines: what they make is what their passes make in turn; their text reads back; errors name the pass."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import dyncompress as dc
from dyncompress.passes.graph.copying import deep_copy
from dyncompress.passes.graph.graph_pass import HAS_EXITS, Condition, GraphPass, PassResult
from dyncompress.passes.pipeline import PASSES
from dyncompress.passes.rewrites.fold_batch_norm import FoldedNorms


class Net(nn.Module):
    """(B, 3, 8, 8) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.last, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(torch.relu(x + self.last(x)).mean((2, 3)))


@pytest.fixture
def gm() -> fx.GraphModule:
    torch.manual_seed(0)
    return dc.capture(Net().eval(), torch.randn(2, 3, 8, 8)).eval()


def test_runs_its_passes_in_turn(gm: fx.GraphModule) -> None:
    before, x = gm.code, torch.randn(4, 3, 8, 8)
    torch.manual_seed(1)
    made = dc.Pipeline([dc.FoldBatchNorm(), dc.InsertExits(1)])(gm)
    torch.manual_seed(1)
    by_hand = dc.InsertExits(1)(dc.FoldBatchNorm()(gm).gm)
    assert made.gm.code == by_hand.gm.code and made.modified and gm.code == before
    for ours, theirs in zip(made.gm(x), by_hand.gm(x), strict=True):
        assert torch.equal(ours, theirs)
    assert made.report == (FoldedNorms(("bn",)), by_hand.report)


def test_passes_that_find_nothing_to_do(gm: fx.GraphModule) -> None:
    twice = dc.Pipeline([dc.FoldBatchNorm(), dc.FoldBatchNorm()])(gm)
    assert twice.modified
    assert not dc.FoldBatchNorm()(twice.gm).modified
    assert not dc.Pipeline([])(gm).modified


@pytest.mark.parametrize(
    "pipeline",
    [
        dc.Pipeline([]),
        dc.Pipeline([dc.FoldBatchNorm(within="net.body"), dc.LowRank(energy=0.9), dc.LowRank(rank=4)]),
        dc.Pipeline([dc.InsertGates("ff1", ("layer1.0:branch", "no: yes")), dc.InsertExits("every", "mlp")]),
        dc.Pipeline([dc.InsertExits(2), dc.InsertExits(("relu_2", "null"), "linear"), dc.KeepExits((2, 0))]),
        dc.Pipeline([dc.Shrink({"fc.weight:0": torch.tensor([1, 3]), "layer1.0:branch": []}, exact=True)]),
    ],
)
def test_text_reads_back(pipeline: dc.Pipeline) -> None:
    assert dc.Pipeline.parse(str(pipeline)) == pipeline


def test_every_pass_prints_and_reads_back() -> None:
    options = {"low-rank": {"rank": 3}}
    for name, kind in PASSES.items():
        made = kind(**options.get(name, {}))
        assert str(made).startswith(name)
        assert dc.Pipeline.parse(f"- {made}").passes == (made,)


def test_ways_to_write_a_pass() -> None:
    text = "- insert-exits\n- insert-exits:\n- insert-exits: {}\n- insert-exits: {exits: 3}\n"
    assert set(dc.Pipeline.parse(text).passes) == {dc.InsertExits()}
    assert str(dc.Pipeline.parse("- insert-exits")) == "- insert-exits: {exits: 3, head: auto}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a pipeline is a list of passes"),
        ("insert-exits: {exits: 3}", "a pipeline is a list of passes"),
        ("- [", "the pipeline is not YAML"),
        ("- insert-exit", "pass 1: there is no pass 'insert-exit': use one of fold-batch-norm, unstack-"),
        ("- 3", "pass 1: expected one pass"),
        ("- {insert-exits: {}, low-rank: {}}", "pass 1: expected one pass"),
        ("- insert-exits\n- insert-gates: pooled", "pass 2, insert-gates: expected options"),
        ("- insert-exits: {exit: 3}", "pass 1, insert-exits: unknown key 'exit': use one of exits, head"),
        ("- insert-exits: {exits: 1.5}", "pass 1, insert-exits: exits: expected int or str or a list of str, got 1.5"),
        ("- insert-exits: {head: best}", "head='best': use one of auto,"),
        ("- shrink: {keep: [1]}", "shrink: keep: expected names with a list of int each, got [1]"),
        ("- shrink: {keep: {fc: [x]}}", "shrink: keep: expected names with a list of int each, got {'fc': ['x']}"),
        ("- low-rank", "low-rank: give exactly one of energy,"),
        ("- insert-exits: !!python/name:os.system", "the pipeline is not YAML"),
    ],
)
def test_mistakes_in_the_text(text: str, says: str) -> None:
    with pytest.raises(dc.RequestError) as caught:
        dc.Pipeline.parse(text)
    assert says in str(caught.value)


@dataclass(frozen=True)
class Broken(GraphPass[None]):
    """Raises, or returns the graph as it was."""

    name: ClassVar[str] = "broken"
    ensures: ClassVar[tuple[Condition, ...]] = (HAS_EXITS,)
    raises: bool = True

    def rewrite(self, gm: fx.GraphModule) -> PassResult[None]:
        if self.raises:
            raise KeyError("bug")
        return PassResult(gm, False, None)


def test_errors_name_the_pass(gm: fx.GraphModule) -> None:
    with pytest.raises(dc.RequestError, match=r"^pass 2, insert-exits: the model already has"):
        dc.Pipeline([dc.InsertExits(1), dc.InsertExits(1)])(gm)
    with pytest.raises(KeyError) as caught:
        dc.Pipeline([dc.FoldBatchNorm(), Broken()])(gm)
    assert caught.value.__notes__ == ["in pass 2 of the pipeline: broken: {raises: true}"]


def test_what_passes_require_and_ensure(gm: fx.GraphModule) -> None:
    dynamic, gated = dc.InsertExits(1)(gm).gm, dc.InsertGates()(gm).gm
    wrong = [
        (dc.KeepExits((0,)), gm, "the graph has no exits; run InsertExits"),
        (dc.KeepExits((1,)), dynamic, "there is no exit 1; the model has 1, numbered from 0"),
        (dc.RemoveGates(), gm, "the graph has no skip gates; run InsertGates"),
        (dc.SettleGates(), gm, "the graph has no skip gates; run InsertGates"),
        (dc.SettleGates(), dc.InsertExits(1)(gated).gm, "the model has exits already, and they come last"),
        (dc.InsertGates(), gated, "already has a module named 'gates'"),
        (dc.InsertExits(1), fx.GraphModule(nn.Module(), fx.Graph()), "use capture"),
        (dc.Shrink({}), fx.GraphModule(nn.Module(), fx.Graph()), "use capture"),
        (dc.FoldBatchNorm(), deep_copy(gm).train(), "call eval"),
    ]
    for step, given, says in wrong:
        with pytest.raises(dc.RequestError, match=says):
            step(given)
    with pytest.raises(dc.DynCompressError, match="broken has not done what it ensures"):
        Broken(raises=False)(gm)


def test_passes_do_what_the_functions_do(gm: fx.GraphModule) -> None:
    keep, x = {"conv.weight:0": [0, 5]}, torch.randn(4, 3, 8, 8)
    made = dc.Shrink(keep)(gm)
    assert made.report.kept == {"conv.weight:0": 2} and made.modified
    assert torch.equal(made.gm(x), dc.shrink(gm, keep)(x))
    gated = dc.InsertGates()(gm).gm
    assert torch.equal(dc.RemoveGates()(gated).gm(x), gm(x))
