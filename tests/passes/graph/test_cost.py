"""MACs against torch's own counter (FLOPs = 2 MACs) and against numbers worked out by hand."""

from typing import Any

import pytest
import torch
from cases import CASES, call, graph, graph_with_exits, model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dyncompress.passes.capture.capture import capture
from dyncompress.passes.graph.cost import count_bytes, count_macs, count_parameters, node_macs


def macs_by_torch(module: nn.Module, one_sample: Any) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(module.eval(), one_sample)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


class Convolutions(nn.Module):
    """Grouped, depthwise, dilated, strided, one-dimensional and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(6, 12, 3, padding=1, groups=3)
        self.depthwise = nn.Conv2d(12, 12, 5, stride=2, dilation=2, groups=12)
        self.up = nn.ConvTranspose2d(12, 8, 3, stride=2, groups=2)
        self.line = nn.Conv1d(8, 4, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self.up(self.depthwise(self.grouped(x))).flatten(2))


class Products(nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        b, t, _ = x.shape
        scores = torch.einsum("bid,bjd->bij", x, x)
        mixed = torch.einsum("...ij,...jd->...id", scores, x) + torch.baddbmm(x, scores, x)
        chain = torch.einsum("bid,df,fe->bie", mixed, w, w.T)
        outer = torch.einsum("bi,bj->bij", x[:, :, 0], x[:, :, 1])  # nothing contracted: elementwise
        flat = torch.addmm(w[0], mixed.reshape(b * t, -1), w)
        return chain.sum() + outer.sum() + flat.sum() + torch.matmul(x, w[:, 0]).sum()


class TwoGroups(nn.Module):
    """Work on a table of parameters, which a batch shares, beside work on the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 3))
        self.on_table, self.on_samples = nn.Linear(3, 5), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.on_samples(x) + self.on_table(self.table).sum(1)


@pytest.mark.parametrize("name", ["resnet", "vgg", "channels-last", "vit", "text", "two-inputs"])
def test_matches_torch_on_networks(name: str) -> None:
    assert count_macs(graph(name)) == macs_by_torch(model(name), CASES[name].batch(1))


def test_matches_torch_on_convolutions() -> None:
    x = torch.randn(1, 6, 16, 16)
    assert count_macs(capture(Convolutions(), x)) == macs_by_torch(Convolutions(), x)


def test_matches_torch_on_products() -> None:
    x, w = torch.randn(1, 4, 6), torch.randn(6, 5)
    by_hand = 4 * 4 * 6 * 3 + 4 * 6 * 5 + 4 * 5 * 6 + 4 * 6 * 5 + 4 * 6
    assert count_macs(capture(Products(), (x, w))) == by_hand
    # matmul with a vector runs as an mv, which torch's counter leaves out
    assert macs_by_torch(Products(), (x, w)) == by_hand - 4 * 6


def test_work_without_a_batch_counts_whole() -> None:
    assert count_macs(capture(TwoGroups(), torch.randn(2, 5))) == 5 * 7 + 7 * 3 * 5


class Recurrent(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@pytest.mark.parametrize(
    ("layer", "per_step"),
    [
        (nn.LSTM(6, 10, batch_first=True), 4 * 10 * (6 + 10)),
        (nn.GRU(6, 10, 2, batch_first=True), 3 * 10 * (6 + 10) + 3 * 10 * (10 + 10)),
        (
            nn.LSTM(6, 10, 2, batch_first=True, bidirectional=True),
            2 * 4 * 10 * (6 + 10) + 2 * 4 * 10 * (20 + 10),
        ),
        (nn.LSTM(6, 10, proj_size=3, batch_first=True), 4 * 10 * (6 + 3) + 10 * 3),
        (nn.RNN(6, 10, bidirectional=True, bias=False, batch_first=True), 2 * 10 * (6 + 10)),
    ],
    ids=["lstm", "gru-2", "bi-lstm-2", "lstm-proj", "bi-rnn"],
)
def test_recurrent_layers_by_hand(layer: nn.RNNBase, per_step: int) -> None:
    assert count_macs(capture(Recurrent(layer), torch.randn(2, 9, 6))) == 9 * per_step


def test_node_macs_name_the_nodes_that_cost() -> None:
    costs = {node.name: macs for node, macs in node_macs(graph("two-inputs")).items() if macs}
    assert costs == {"hidden_0": 144, "hidden_1": 144, "hidden_2": 144, "fc": 36}


def test_heads_add_their_own_cost() -> None:
    gm = graph_with_exits("resnet")
    heads = sum(m.linear.weight.numel() for m in gm.exits.children())
    assert count_macs(gm) == count_macs(graph("resnet")) + heads


def test_parameters_and_bytes() -> None:
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    tied[1].weight = tied[0].weight
    gm = capture(tied.eval(), torch.randn(2, 4))
    assert count_parameters(gm) == 16 + 8
    buffers = sum(b.numel() * b.element_size() for b in gm.buffers())
    assert count_bytes(gm) == 4 * 24 + buffers
    assert count_bytes(gm.half()) == 2 * 24 + sum(b.numel() * b.element_size() for b in gm.buffers())
