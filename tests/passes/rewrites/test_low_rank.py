"""Low-rank pairs: numpy's singular values, the Eckart-Young error, targets met; the result is like any model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dyncompress as dc
from dyncompress.passes.graph.cost import count_macs, count_parameters, node_macs
from dyncompress.passes.rewrites.low_rank import LowRankLayer, LowRankReport


class Net(nn.Module):
    """Everything that becomes a pair, and four layers that must not: grouped, called twice, tied, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.point = nn.Conv2d(24, 32, 1, bias=False)
        self.line = nn.Conv1d(32, 16, 3, dilation=2, padding="same")
        self.grouped = nn.Conv1d(16, 16, 3, groups=2)
        self.up = nn.ConvTranspose1d(16, 16, 3)
        self.twice = nn.Linear(16, 16)
        self.tied, self.tied_too = nn.Linear(16, 16), nn.Linear(16, 16)
        self.tied_too.weight = self.tied.weight
        self.fc = nn.Linear(16, 20)
        self.out = nn.Linear(20, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.point(F.relu(self.conv(x))))
        x = self.up(self.grouped(self.line(x.flatten(2)))).mean(2)
        x = self.tied_too(self.tied(self.twice(self.twice(x))))
        return self.out(F.relu(self.fc(x)))


PAIRS = ["conv", "point", "line", "fc", "out"]


@pytest.fixture
def gm() -> fx.GraphModule:
    torch.manual_seed(0)
    return dc.capture(Net().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64))


def product(gm: fx.GraphModule, path: str) -> np.ndarray:
    """The matrix that a pair multiplies with."""
    first, last = (gm.get_submodule(f"{path}.{half}").weight.detach().flatten(1).numpy() for half in "01")
    return last @ first


def test_every_pair_is_the_nearest_matrix_of_its_rank(gm: fx.GraphModule) -> None:
    result = dc.LowRank(rank=3)(gm)
    assert list(result.report.layers) == PAIRS and result.modified
    for path in PAIRS:
        weight = gm.get_submodule(path).weight.detach().flatten(1).numpy()
        s = np.linalg.svd(weight, compute_uv=False)
        found = product(result.gm, path)
        assert np.linalg.matrix_rank(found) == 3
        np.testing.assert_allclose(((weight - found) ** 2).sum(), (s[3:] ** 2).sum())  # Eckart and Young
        kept = (s[:3] ** 2).sum() / (s**2).sum()
        assert result.report.layers[path] == LowRankLayer(3, len(s), pytest.approx(kept))


def test_energy_is_the_least_rank_that_keeps_it(gm: fx.GraphModule) -> None:
    for path, pair in dc.LowRank(energy=0.5)(gm).report.layers.items():
        s = np.linalg.svd(gm.get_submodule(path).weight.detach().flatten(1).numpy(), compute_uv=False)
        shares = [sum(s[:r] ** 2) / sum(s**2) for r in range(1, len(s) + 1)]
        assert pair.rank == next(r for r, share in enumerate(shares, 1) if share >= 0.5)


def test_weights_of_low_rank_give_the_same_function(gm: fx.GraphModule) -> None:
    with torch.no_grad():
        for path in PAIRS:
            weight = gm.get_submodule(path).weight
            rows, columns = torch.randn(len(weight), 4).double(), torch.randn(4, weight[0].numel()).double()
            weight.copy_((rows @ columns).view_as(weight))
    result = dc.LowRank(energy=1.0)(gm)
    assert [pair.rank for pair in result.report.layers.values()] == [4] * len(PAIRS)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(result.gm(x), gm(x))
    assert count_macs(result.gm) < count_macs(gm) and "conv.weight" in gm.state_dict()


def test_full_rank_saves_nothing_and_changes_nothing(gm: fx.GraphModule) -> None:
    result = dc.LowRank(energy=1.0)(gm)
    assert not result.modified and result.report == LowRankReport({}, 1.0)
    assert count_macs(result.gm) == count_macs(gm)


@pytest.mark.parametrize("share", [0.75, 0.5, 0.3])
@pytest.mark.parametrize("metric", ["macs", "params"])
def test_a_share_is_met_at_one_energy(metric: str, share: float) -> None:
    torch.manual_seed(0)
    body = [layer for _ in range(3) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 64, 3), *body, nn.Flatten(), nn.Linear(64 * 36, 128), nn.Linear(128, 10))
    gm = dc.capture(model.eval(), torch.randn(2, 3, 8, 8))
    result = dc.LowRank(**{metric: share})(gm)
    count = count_macs if metric == "macs" else count_parameters
    assert share * 0.98 <= count(result.gm) / count(gm) <= share
    assert result.report.left == pytest.approx(count_macs(result.gm) / count_macs(gm))
    energies = [pair.energy for pair in result.report.layers.values()]
    ranks = [pair.rank for pair in result.report.layers.values()]
    one_less = []
    for path, rank in zip(result.report.layers, ranks, strict=True):
        s = torch.linalg.svdvals(gm.get_submodule(path).weight.detach().flatten(1)).double() ** 2
        one_less.append(float(s[: rank - 1].sum() / s.sum()))
    assert max(one_less) < min(energies)  # some energy lies between: the same for all


def test_the_cost_of_a_pair_by_hand() -> None:
    gm = dc.capture(nn.Sequential(nn.Conv2d(8, 16, 3, stride=2)).eval(), torch.randn(2, 8, 9, 9))
    small = dc.LowRank(rank=5)(gm).gm
    assert list(node_macs(small).values()) == [0, 16 * 5 * 8 * 9, 16 * 16 * 5, 0]  # 4 x 4 places


def test_the_result_is_a_model_like_any_other(gm: fx.GraphModule, tmp_path: Path) -> None:
    small = dc.LowRank(energy=0.6)(gm).gm
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    axes = {axis.name for axis in dc.infer_axes(small).prunable}
    assert {"conv.0.weight:0", "line.0.weight:0", "fc.0.weight:0"} <= axes  # the ranks can be pruned too
    keep = {axis.name: range(0, axis.size, 2) for axis in dc.infer_axes(small).prunable}
    torch.testing.assert_close(dc.shrink(small, keep, exact=True)(x), dc.mask(small, keep)(x))
    dc.save(small, tmp_path / "small.safetensors")
    loaded = dc.load(tmp_path / "small.safetensors")
    assert torch.equal(loaded(x), small(x)) and set(loaded.state_dict()) == set(small.state_dict())
    single = dc.capture(small.float(), x.float())
    dc.export_onnx(single, tmp_path / "small.onnx")  # compares with onnxruntime before it writes
    assert (tmp_path / "small.onnx").exists()


def test_frozen_weights_stay_frozen(gm: fx.GraphModule) -> None:
    gm.fc.weight.requires_grad_(False)
    small = dc.LowRank(rank=2)(gm).gm
    frozen = [name for name, parameter in small.named_parameters() if not parameter.requires_grad]
    assert frozen == ["fc.0.weight", "fc.1.weight"]


def test_mistakes_are_one_line(gm: fx.GraphModule) -> None:
    for options, words in (
        ({}, "exactly one"),
        ({"rank": 2, "energy": 0.5}, "exactly one"),
        ({"rank": 0}, "rank is 0: from 1"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"macs": 0.0}, "macs is 0"),
    ):
        with pytest.raises(dc.RequestError, match=words):
            dc.LowRank(**options)
    with pytest.raises(dc.RequestError, match=r"params=0.01 is out of reach: 0\.\d+ is left"):
        dc.LowRank(params=0.01)(gm)
    gm.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(dc.RequestError, match=r"fc\.weight holds values that are not finite"):
        dc.LowRank(rank=2)(gm)
