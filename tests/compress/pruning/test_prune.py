"""Pruning: targets met, importance by hand, limits kept, wrong requests refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flat_options import flat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dyncompress as dc
from dyncompress.compress.importance.scores import IMPORTANCES, NEED_DATA, Context, l2_scores, taylor_scores
from dyncompress.compress.pruning import after_cut
from dyncompress.compress.pruning import prune as pruning
from dyncompress.compress.pruning.removal_search import choose
from dyncompress.compress.training.hooks import Hook
from dyncompress.model_zoo import zoo as models
from dyncompress.passes.graph.cost import count_bytes, count_macs, count_parameters


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
    counts = {"macs": count_macs, "params": count_parameters, "bytes": count_bytes, "ratio": channels}
    for metric, count in counts.items():
        small = flat(dc.prune)(gm, **{metric: target}, round_to=round_to, floor=0.05)
        assert target - 0.02 <= count(small) / count(gm) <= target, metric
        assert small(torch.randn(5, 3, 12, 12)).shape == (5, 10)


@pytest.mark.parametrize("name", [name for name in models.ZOO if models.ZOO[name].trained])
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
    small = dc.prune(gm, ratio=(total - len(weak)) / total, cuts=dc.Cuts(scope="global"))
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
    small = dc.prune(gm, macs=0.3, limits=dc.Limits(floor=0.25, ignore=["stem"]))
    assert small.stem.out_channels == 32 and small.a.out_channels >= 12
    assert small.norm.num_features == 32  # shares the stem's axis through the residual


def test_counts_are_multiples(gm: torch.fx.GraphModule) -> None:
    small = dc.prune(gm, macs=0.5, limits=dc.Limits(round_to=8))
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
        ({"macs": 0.5, "ceiling": 0.05}, "ceiling"),
        ({"macs": 0.9, "ceiling": 0.5}, "at most .* stays"),
        ({"macs": 0.5, "scope": "town"}, "unknown scope"),
        ({"macs": 0.5, "steps": 0}, "steps"),
        ({"macs": 0.5, "finetune": -1}, "finetune"),
        ({"macs": 0.5, "finetune": 1}, "finetune needs data"),
        ({"macs": 0.5, "resume": True}, "run_dir"),
        ({"macs": 0.5, "seed": -1, "importance": "random"}, "seed"),
    ],
)
def test_wrong_requests(gm: torch.fx.GraphModule, options: dict, said: str) -> None:
    with pytest.raises(dc.RequestError, match=said):
        flat(dc.prune)(gm, **options)
    with pytest.raises(dc.RequestError, match="example_inputs"):
        dc.prune(Residual(), macs=0.5)


# --- scopes, ceilings, depth ---------------------------------------------------------------------------------------


def sizes(model: torch.fx.GraphModule) -> dict[str, int]:
    return {axis.name: axis.size for axis in dc.infer_axes(model).prunable if axis.kind != "branch"}


@pytest.mark.parametrize("importance", ["l2", "random", "lamp"])
def test_every_axis_loses_the_same_share(importance: str, gm: torch.fx.GraphModule) -> None:
    small = dc.prune(gm, params=0.4, importance=importance, cuts=dc.Cuts(scope="axis"))
    shares = {name: size / sizes(gm)[name] for name, size in sizes(small).items()}
    assert max(shares.values()) - min(shares.values()) <= 2 / 32


def test_axes_lose_the_same_share_unless_depth_or_latency_is_to_choose(gm: torch.fx.GraphModule) -> None:
    assert sizes(dc.prune(gm, macs=0.5)) == sizes(dc.prune(gm, macs=0.5, cuts=dc.Cuts(scope="axis")))
    deep, everything = dc.Limits(depth=True), dc.Cuts(scope="global")
    assert sizes(dc.prune(gm, macs=0.5, limits=deep)) == sizes(dc.prune(gm, macs=0.5, limits=deep, cuts=everything))


def test_every_block_loses_the_same_share() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in ((6, 40), (40, 60), (60, 80), (80, 5))]
    with torch.no_grad():
        layers[0].weight[10:] *= 30  # a quarter of the first axis is worth little, three quarters much
    plain = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.ReLU(), layers[3])
    gm = dc.capture(plain, torch.randn(2, 6))
    found = sizes(dc.prune(gm, ratio=0.5, cuts=dc.Cuts(scope="block")))
    assert [found[f"{i}.weight:0"] for i in (0, 2, 4)] == pytest.approx([20, 30, 40], abs=1)
    free = sizes(dc.prune(gm, ratio=0.5, cuts=dc.Cuts(scope="global")))
    assert [free[f"{i}.weight:0"] for i in (0, 2, 4)] != pytest.approx([20, 30, 40], abs=1)


def test_no_axis_stays_above_the_ceiling(gm: torch.fx.GraphModule) -> None:
    free = dc.prune(gm, macs=0.5, cuts=dc.Cuts(scope="global"))
    held = dc.prune(gm, macs=0.5, cuts=dc.Cuts(scope="global"), limits=dc.Limits(ceiling=0.7))
    assert max(size / sizes(gm)[name] for name, size in sizes(free).items()) > 0.75
    assert all(size <= -(-sizes(gm)[name] * 7 // 10) for name, size in sizes(held).items())
    assert 0.48 <= count_macs(held) / count_macs(gm) <= 0.5


class Deep(nn.Module):
    """Five residual branches of equal cost."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


@pytest.mark.parametrize("metric", ["macs", "params", "ratio"])
@pytest.mark.parametrize(("scope", "target"), [("global", 0.7), ("axis", 0.45), ("block", 0.7)])
def test_a_branch_that_does_nothing_goes_first(metric: str, scope: str, target: float) -> None:
    torch.manual_seed(0)
    deep = Deep()
    with torch.no_grad():
        for p in deep.branches[3].parameters():
            p *= 1e-6
    gm = dc.capture(deep, torch.randn(2, 8))
    small = flat(dc.prune)(gm, **{metric: target}, depth=True, scope=scope)
    kept = small.meta["info"]["prune"]["kept"]
    gone = {name for name, axis in kept.items() if axis["kind"] == "branch" and not axis["kept"]}
    assert "branches.3:branch" in gone
    assert kept["branches.3.0.weight:0"]["kept"] == []
    assert not any(name.startswith("branches.3.") for name in small.state_dict())
    counts = {"macs": count_macs, "params": count_parameters}
    if metric in counts:
        assert target - 0.02 <= counts[metric](small) / counts[metric](gm) <= target
    assert small(torch.randn(4, 8)).shape == (4, 3)
    whole = flat(dc.prune)(gm, **{metric: target}, scope=scope)
    assert all(axis["kept"] for axis in whole.meta["info"]["prune"]["kept"].values())


def test_choose_keeps_its_call(gm: torch.fx.GraphModule) -> None:
    axes = dc.infer_axes(gm)
    keep = choose(axes, l2_scores(gm, axes.prunable), "macs", 0.5, dc.Limits(floor=0.2, round_to=4, ignore=("stem",)))
    assert axes["stem.weight:0"].atom not in keep
    assert all(len(kept) % 4 == 0 for kept in keep.values())


@pytest.mark.parametrize("importance", list(IMPORTANCES))
def test_every_importance_prunes(importance: str, gm: torch.fx.GraphModule) -> None:
    data = TensorDataset(torch.randn(24, 3, 12, 12), torch.arange(24) % 10)
    data, depth = data if importance in NEED_DATA else None, dc.Limits(depth=True)
    small = dc.prune(gm, macs=0.5, importance=importance, data=data, limits=depth)
    assert 0.48 <= count_macs(small) / count_macs(gm) <= 0.5


# --- several cuts --------------------------------------------------------------------------------------------------


@pytest.fixture
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(48, 3, 12, 12, generator=generator), torch.arange(48) % 10)


def test_cuts_follow_a_geometric_schedule(gm: torch.fx.GraphModule, data: TensorDataset) -> None:
    options: dict[str, Any] = {"macs": 0.4, "steps": 3, "importance": "taylor", "finetune": 1, "batch_size": 16}
    small = flat(dc.prune)(gm, data=data, **options)
    assert 0.38 <= count_macs(small) / count_macs(gm) <= 0.4
    done = small.meta["info"]["prune"]["steps"]
    assert [step["goal"] for step in done] == pytest.approx([0.4 ** (1 / 3), 0.4 ** (2 / 3), 0.4])
    assert all(0.98 * step["goal"] <= step["left"] <= step["goal"] for step in done)
    assert done[-1]["left"] == pytest.approx(count_macs(small) / count_macs(gm))


def test_kept_indices_are_the_originals(gm: torch.fx.GraphModule) -> None:
    small = dc.prune(gm, macs=0.3, cuts=dc.Cuts(steps=4))  # no training: the weights tell which channel they were
    kept = small.meta["info"]["prune"]["kept"]
    torch.testing.assert_close(
        small.a.weight, gm.a.weight[kept["a.weight:0"]["kept"]][:, kept["stem.weight:0"]["kept"]]
    )
    torch.testing.assert_close(small.wide.bias, gm.wide.bias[kept["wide.weight:0"]["kept"]])
    assert [kept["a.weight:0"][key] for key in ("kind", "size")] == ["channels", 48]


def test_the_floor_is_a_share_of_the_original(gm: torch.fx.GraphModule) -> None:
    small = dc.prune(gm, macs=0.2, cuts=dc.Cuts(steps=4), limits=dc.Limits(floor=0.4))
    assert min(size / sizes(gm)[name] for name, size in sizes(small).items()) >= 0.4


class Stop(Exception):
    pass


class StopInTheSecondEpoch(Hook):
    def after_step(self, step: int) -> None:
        if step == 3:
            raise Stop


@pytest.mark.parametrize("interrupted_at", [1, 2])
def test_an_interrupted_pruning_ends_as_if_it_had_not_been(
    interrupted_at: int, gm: torch.fx.GraphModule, data: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"macs": 0.5, "steps": 2, "finetune": 2, "batch_size": 16, "data": data}
    straight = flat(dc.prune)(gm, **options)
    calls, fit = [], after_cut.fit

    def stopping(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(model)
        if len(calls) < interrupted_at:
            return fit(model, *args, **kwargs)
        return fit(model, *args, **kwargs | {"hooks": [StopInTheSecondEpoch()]})

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(after_cut, "fit", stopping)
        flat(dc.prune)(gm, **options, run_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "score_axes", lambda gm, axes, *rest: {a.name: torch.rand(a.size) for a in axes})
        if interrupted_at == 2:  # both cuts were made: nothing is ranked again
            resumed = flat(dc.prune)(gm, **options, run_dir=tmp_path, resume=True)
    if interrupted_at == 1:
        resumed = flat(dc.prune)(gm, **options, run_dir=tmp_path, resume=True)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert resumed.meta["info"] == straight.meta["info"]


def test_runs_are_not_mixed(gm: torch.fx.GraphModule, tmp_path: Path) -> None:
    dc.prune(gm, macs=0.5, run=dc.Run(run_dir=tmp_path))
    with pytest.raises(dc.RequestError, match="holds a run already"):
        dc.prune(gm, macs=0.5, run=dc.Run(run_dir=tmp_path))
    with pytest.raises(dc.RequestError, match=r"has floor = 0\.1, not 0\.2"):
        dc.prune(gm, macs=0.5, limits=dc.Limits(floor=0.2), run=dc.Run(run_dir=tmp_path, resume=True))
    with pytest.raises(dc.RequestError, match=r"has macs = 0\.5, not 0\.6"):
        dc.prune(gm, macs=0.6, run=dc.Run(run_dir=tmp_path, resume=True))
    file = tmp_path / "cuts.pt"
    assert len(torch.load(file)["cuts"]) == 1
    file.write_text("{")
    with pytest.raises(dc.RequestError, match="cannot be read as a saved run"):
        dc.prune(gm, macs=0.5, run=dc.Run(run_dir=tmp_path, resume=True))


def test_labels_that_the_model_does_not_have(gm: torch.fx.GraphModule) -> None:
    bad = TensorDataset(torch.randn(20, 3, 12, 12), torch.arange(20))
    with pytest.raises(dc.RequestError, match="the model puts out 10 classes"):
        dc.prune(gm, macs=0.5, data=bad, finetune=1)
