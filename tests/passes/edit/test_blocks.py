"""Cut points and blocks against what can be read off the models by hand, and against plain liveness."""

from itertools import pairwise

import pytest
import torch
from cases import CASES, graph
from torch import Tensor, fx, nn

from dyncompress.passes.capture.capture import capture
from dyncompress.passes.edit.analysis import analyse
from dyncompress.passes.edit.cut_points import CutPoint
from dyncompress.passes.graph.cost import CAPTURE_BATCH, count_macs


def names(points: list[CutPoint]) -> list[str]:
    return [p.node.name for p in points]


def plainly_live(gm: fx.GraphModule, after: fx.Node) -> set[fx.Node]:
    """Computed up to a node and read by a later one."""
    order = list(gm.graph.nodes)
    before, later = order[: order.index(after) + 1], set(order[order.index(after) + 1 :])
    return {n for n in before if later & set(n.users)}


def test_residual_network_is_single_between_blocks_only() -> None:
    single = [p for p in analyse(graph("resnet")).cut_points if p.single]
    between = ["add", "relu_2", "add_1", "relu_4", "add_2", "relu_6", "add_3", "relu_8"]
    assert names(single) == ["stem_0", "stem_1", "relu", *between, "mean", "drop", "fc"]
    assert all(p.live == (p.node,) for p in single)


def test_transformer_is_single_after_each_residual_sum() -> None:
    single = names([p for p in analyse(graph("vit")).cut_points if p.single])
    assert single[:5] == ["patch", "flatten", "transpose", "cat", "add"]
    assert single[5:] == [f"add_{i}" for i in range(1, 9)] + ["norm", "select", "head"]


@pytest.mark.parametrize("name", CASES)
def test_every_live_value_is_one_later_nodes_read(name: str) -> None:
    gm = graph(name)
    for point in analyse(gm).cut_points:
        plain = plainly_live(gm, point.node)
        assert set(point.live) <= plain
        for left_out in plain - set(point.live):
            made_again = left_out.op == "get_attr" or not isinstance(left_out.meta["val"], Tensor)
            assert made_again or left_out.name in {"mul", "neg"}  # the start states of the LSTM
        for value in point.live:
            val = value.meta["val"]
            assert not isinstance(val, Tensor) or CAPTURE_BATCH not in val.shape[1:]


@pytest.mark.parametrize("name", CASES)
def test_macs_grow_from_the_first_to_the_last(name: str) -> None:
    gm = graph(name)
    spent = [p.macs for p in analyse(gm).cut_points]
    assert spent == sorted(spent) and spent[-1] == count_macs(gm)


def test_masks_and_late_inputs_travel_along() -> None:
    points = {p.node.name: p for p in analyse(graph("text")).cut_points}
    mask, length, as_bool, node = points["add_4"].live
    assert points["add_4"].single and node is points["add_4"].node
    assert (mask.name, length.meta["val"], as_bool.meta["val"].dtype) == ("attention_mask", 7, torch.bool)
    hidden = [p for p in analyse(graph("two-inputs")).cut_points if p.node.name.startswith("relu")]
    assert len(hidden) == 3 and all(p.single and p.live[0].name == "late" for p in hidden)


def test_tensors_made_for_the_batch_do_not_cross() -> None:
    points = {p.node.name: p for p in analyse(graph("lstm")).cut_points}
    recurrent = [p for name, p in points.items() if name.startswith("getitem")]
    assert len(recurrent) == 3 and all(p.single and p.live == (p.node,) for p in recurrent)


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.lstm, self.fc = nn.Linear(4, 4), nn.LSTM(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.inner(x).transpose(0, 1))
        return self.fc(y[-1])


def test_no_cut_where_the_batch_is_not_first() -> None:
    gm = capture(TimeFirst(), torch.randn(2, 5, 4))
    assert names(analyse(gm).cut_points) == ["inner", "select", "fc"]


def test_no_cut_before_an_in_place_operator() -> None:
    found = names(analyse(graph("vgg")).cut_points)
    assert "relu_" in found and "features_0" not in found and "classifier_0" not in found


@torch.library.custom_op("exit_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x * 2


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Mystery(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.ops.exit_tests.mystery(self.a(x)))


def test_no_cut_where_an_unknown_operator_hides_the_batch() -> None:
    gm = capture(Mystery(), torch.randn(2, 4))
    assert names(analyse(gm).cut_points) == ["a"]


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_the_stretches_between_single_cuts(name: str) -> None:
    gm = graph(name)
    found = analyse(gm).blocks
    assert names([b.end for b in found]) == names([p for p in analyse(gm).cut_points if p.single])
    order = list(gm.graph.nodes)
    covered = [n for b in found for n in b.nodes]
    assert covered == order[: len(covered)]
    assert sum(b.macs for b in found) == found[-1].end.macs
    assert all(b.start is a.end for a, b in pairwise(found)) and found[0].start is None
