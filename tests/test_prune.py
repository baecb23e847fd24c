"""Pruning: targets met, importance by hand, limits kept, wrong requests refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dyncompress as dc
from dyncompress.compress.importance import Context, l2_scores, taylor_scores
from dyncompress.model_zoo import models
from dyncompress.passes.cost import count_macs, count_parameters


class Residual(nn.Module):
    """A CNN with a residual branch and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv2d(3, 32, 3, padding=1),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.Conv2d(48, 32, 1),
        )
        self.norm = nn.BatchNorm2d(32)
        self.wide, self.head = nn.Conv2d(32, 64, 3), nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.norm(x + self.b(F.relu(self.a(x))))
        return self.head(torch.cat([x.mean((2, 3)), self.wide(x).mean((2, 3))], 1))


@pytest.fixture
def gm() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return dc.capture(Residual(), torch.randn(2, 3, 12, 12))


def channels(gm: torch.fx.GraphModule) -> int:
    return gm.stem.out_channels + gm.a.out_channels + gm.wide.out_channels


@pytest.mark.parametrize(("target", "round_to"), [(0.9, 1), (0.5, 1), (0.2, 1), (0.7, 2), (0.4, 2)])
def test_targets_are_met_within_two_percent(gm: torch.fx.GraphModule, target: float, round_to: int) -> None:
    counts = {"macs": count_macs, "params": count_parameters, "ratio": channels}
    for metric, count in counts.items():
        small = dc.prune(gm, **{metric: target}, round_to=round_to, floor=0.05)
        assert target - 0.02 <= count(small) / count(gm) <= target, metric
        assert small(torch.randn(5, 3, 12, 12)).shape == (5, 10)


@pytest.mark.parametrize("name", list(models.ZOO))
def test_zoo_models_lose_half_their_macs(name: str) -> None:
    model, x = models.build(name), models.example_input(name)
    gm = dc.capture(model, x)
    small = dc.prune(model, x, macs=0.5)
    assert 0.49 <= count_macs(small) / count_macs(gm) <= 0.5
    assert small.eval()(x).shape == (2, 10)


def test_the_least_important_channels_go_first(gm: torch.fx.GraphModule) -> None:
    weak = [1, 5, 6, 30]
    with torch.no_grad():
        for tensor, dim in ((gm.a.weight, 0), (gm.a.bias, 0), (gm.b.weight, 1)):
            tensor.index_fill_(dim, torch.tensor(weak), 1e-4)
    total = channels(gm)
    small = dc.prune(gm, ratio=(total - len(weak)) / total)
    assert small.a.out_channels == 48 - len(weak)
    stays = [i for i in range(48) if i not in weak]
    torch.testing.assert_close(small.a.weight, gm.a.weight[stays])
    torch.testing.assert_close(small.b.weight, gm.b.weight[:, stays])


def test_l2_scores_by_hand(gm: torch.fx.GraphModule) -> None:
    scores = l2_scores(gm, dc.infer_axes(gm).prunable)["a.weight:0"]
    by_hand = [
        (gm.a.weight[i].square().sum() + gm.a.bias[i].square() + gm.b.weight[:, i].square().sum()).sqrt()
        for i in range(48)
    ]
    torch.testing.assert_close(scores.float(), torch.stack(by_hand).detach())


def test_taylor_scores_predict_what_removal_does_to_the_loss() -> None:
    torch.manual_seed(0)
    gm = dc.capture(Residual().double().eval(), torch.randn(2, 3, 12, 12).double())
    data = TensorDataset(torch.randn(48, 3, 12, 12).double(), torch.randint(0, 10, (48,)))
    axes = dc.infer_axes(gm)
    scores = taylor_scores(gm, [axes["a.weight:0"]], Context(data))["a.weight:0"]

    # <w, dL/dw> is minus the slope of the loss while the group is scaled towards zero: measured by differences
    def loss(scale: float, index: int) -> Tensor:
        keep = {"a.weight:0": [i for i in range(48) if i != index]}
        zeroed, partly = dc.mask(gm, keep), dc.mask(gm, keep)
        with torch.no_grad():
            for w, z, p in zip(gm.parameters(), zeroed.parameters(), partly.parameters(), strict=True):
                p.copy_(z + scale * (w - z))
            x, y = data.tensors
            return F.cross_entropy(partly(x), y)

    step = 1e-4
    for index in (0, 7, 31):
        slope = (loss(1 + step, index) - loss(1 - step, index)) / (2 * step)
        torch.testing.assert_close(scores[index], slope.abs(), rtol=1e-4, atol=1e-9)
    assert all(p.grad is None for p in gm.parameters())


def test_floors_and_ignored_layers_stay(gm: torch.fx.GraphModule) -> None:
    small = dc.prune(gm, macs=0.3, floor=0.25, ignore=["stem"])
    assert small.stem.out_channels == 32 and small.a.out_channels >= 12
    assert small.norm.num_features == 32  # shares the stem's axis through the residual


def test_counts_are_multiples(gm: torch.fx.GraphModule) -> None:
    small = dc.prune(gm, macs=0.5, round_to=8)
    assert all(axis.size % 8 == 0 for axis in dc.infer_axes(small).prunable if axis.size > 8)


def test_the_original_stays_as_it_was(gm: torch.fx.GraphModule) -> None:
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    dc.prune(gm, macs=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in gm.state_dict().items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "exactly one"),
        ({"macs": 0.5, "ratio": 0.5}, "exactly one"),
        ({"macs": 0.0}, "above 0"),
        ({"macs": 1.5}, "at most 1"),
        ({"macs": 0.01, "floor": 0.5}, "out of reach"),
        ({"macs": 0.5, "importance": "magic"}, "unknown importance"),
        ({"macs": 0.5, "importance": "taylor"}, "needs data"),
        ({"macs": 0.5, "ignore": ["nope"]}, "nope"),
        ({"macs": 0.5, "round_to": 0}, "round_to"),
        ({"macs": 0.5, "floor": 2.0}, "floor"),
    ],
)
def test_wrong_requests(gm: torch.fx.GraphModule, options: dict, said: str) -> None:
    with pytest.raises(dc.RequestError, match=said):
        dc.prune(gm, **options)
    with pytest.raises(dc.RequestError, match="example_inputs"):
        dc.prune(Residual(), macs=0.5)
