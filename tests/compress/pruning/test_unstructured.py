"""Magnitude pruning against torch.nn.utils.prune, zeros held in training, and sparse kernels against dense ones."""

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import dyncompress as dc
from dyncompress.compress.pruning.baselines import prune_weights
from dyncompress.compress.pruning.unstructured import HoldZeros, SparseConv2d, SparseLinear, as_sparse
from dyncompress.compress.training.losses import cross_entropy
from dyncompress.compress.training.trainer import fit
from dyncompress.model_zoo.load_data import ArrayDataset
from dyncompress.passes.graph.cost import count_bytes, count_macs, count_parameters


class Net(nn.Module):
    """Convolutions with every setting, a norm, a linear layer that was not lifted, and a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 12, 3, stride=2, padding=(1, 2), bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.wide = nn.Conv2d(12, 16, (3, 2), dilation=2)
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.point = nn.Conv2d(16, 20, 1)
        self.free = nn.Parameter(torch.randn(18, 20) / 4)
        self.fc = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.wide(F.relu(self.norm(self.conv(x)))))
        x = self.point(F.relu(x)).flatten(2).transpose(1, 2)
        return self.fc(F.relu(F.linear(x, self.free))).mean(1)


WEIGHTS = ["conv.weight", "wide.weight", "grouped.weight", "point.weight", "free", "fc.weight"]


@pytest.fixture
def gm() -> fx.GraphModule:
    torch.manual_seed(0)
    return dc.capture(Net().double().eval(), torch.randn(2, 1, 12, 12, dtype=torch.float64))


def zeros_of(gm: fx.GraphModule, names: list[str]) -> np.ndarray:
    named = dict(gm.named_parameters())
    return np.concatenate([(named[name].detach().numpy() == 0).ravel() for name in names])


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9, 1.0])
def test_global_magnitude_is_what_torch_prunes(gm: fx.GraphModule, sparsity: float) -> None:
    pruned = prune_weights(gm, sparsity=sparsity)
    zeros = zeros_of(pruned, WEIGHTS)
    assert zeros.sum() == round(sparsity * len(zeros))
    rest = [name for name, _ in gm.named_parameters() if name not in WEIGHTS]
    before, after = dict(gm.named_parameters()), dict(pruned.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in rest) and "norm.weight" in rest
    peer = dc.capture(Net().double().eval(), torch.randn(2, 1, 12, 12, dtype=torch.float64))
    peer.load_state_dict(gm.state_dict())
    chosen = [(peer.get_submodule(p), n) for p, _, n in (name.rpartition(".") for name in WEIGHTS)]
    torch_prune.global_unstructured(chosen, torch_prune.L1Unstructured, amount=round(sparsity * len(zeros)))
    for (module, name), path in zip(chosen, WEIGHTS, strict=True):
        assert torch.equal(getattr(module, name), after[path])


def test_each_layer_loses_the_same_share(gm: fx.GraphModule) -> None:
    pruned = prune_weights(gm, sparsity=0.5, scope="layer")
    for name in WEIGHTS:
        weight = dict(gm.named_parameters())[name].detach().numpy().ravel()
        goes = np.argsort(np.abs(weight))[: round(0.5 * weight.size)]
        assert set(np.flatnonzero(zeros_of(pruned, [name]))) == set(goes.tolist())
    assert set(pruned.meta["info"]["prune_weights"]["zeros"]) == set(WEIGHTS)
    assert not zeros_of(gm, WEIGHTS).any()


def test_ties_and_recurrent_and_embedded_weights() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lstm = nn.Embedding(11, 8), nn.LSTM(8, 8, batch_first=True)
            self.own, self.out = nn.Linear(8, 8), nn.Linear(8, 11)
            self.out.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.own(self.lstm(self.embed(x))[0]))

    gm = dc.capture(Words().eval(), torch.randint(11, (2, 5)))
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.fill_(1.0)  # nothing but ties
    pruned = prune_weights(gm, sparsity=0.25)
    names = ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "own.weight"]
    assert zeros_of(pruned, names).sum() == round(0.25 * (256 + 256 + 64))
    others = [name for name, _ in pruned.named_parameters() if name not in names]
    assert len(others) == 5 and not zeros_of(pruned, others).any()


def test_zeros_stay_while_the_rest_is_trained(gm: fx.GraphModule) -> None:
    pruned = prune_weights(gm.float(), sparsity=0.6)
    zeros, before = zeros_of(pruned, WEIGHTS), {n: p.detach().clone() for n, p in pruned.named_parameters()}
    data = ArrayDataset(torch.randn(40, 1, 12, 12), torch.randint(3, (40,)))
    training, run = dc.Training(epochs=2, batch_size=10, lr=1e-2), dc.Run(device="cpu", progress=False)
    fit(pruned, cross_entropy, data, training, run, hooks=[HoldZeros(pruned)])
    assert np.array_equal(zeros_of(pruned, WEIGHTS), zeros)
    assert all(not torch.equal(p, before[name]) for name, p in pruned.named_parameters())


def test_sparse_kernels_compute_the_same(gm: fx.GraphModule) -> None:
    pruned = prune_weights(gm, sparsity=0.7)
    sparse = as_sparse(pruned)
    kinds = {path: type(sparse.get_submodule(path)) for path in ("conv", "wide", "grouped", "point", "fc")}
    assert kinds == {
        "conv": SparseConv2d, "wide": SparseConv2d, "grouped": nn.Conv2d, "point": SparseConv2d, "fc": SparseLinear
    }  # fmt: skip
    for batch in (1, 5):
        x = torch.randn(batch, 1, 12, 12, dtype=torch.float64)
        torch.testing.assert_close(sparse(x), pruned(x))


def test_what_is_stored_and_multiplied_is_counted() -> None:
    torch.manual_seed(0)
    pruned = prune_weights(dc.capture(nn.Sequential(nn.Linear(40, 30)).eval(), torch.randn(2, 40)), sparsity=0.75)
    sparse = as_sparse(pruned)
    assert count_macs(pruned) == 1200 and count_macs(sparse) == 300
    assert count_parameters(pruned) == 1230 and count_parameters(sparse) == 330
    assert count_bytes(sparse) == 4 * (300 + 300 + 31 + 30)  # values, columns, starts of rows, bias


def test_nothing_to_run_sparsely(gm: fx.GraphModule) -> None:
    dense = as_sparse(gm)
    assert not any(isinstance(module, SparseLinear) for module in dense.modules())


def test_mistakes_are_one_line(gm: fx.GraphModule) -> None:
    with pytest.raises(dc.RequestError, match=r"sparsity is the share .* got 1\.5"):
        prune_weights(gm, sparsity=1.5)
    with pytest.raises(dc.RequestError, match="no scope 'block': use one of global, layer"):
        prune_weights(gm, sparsity=0.5, scope="block")
    with pytest.raises(dc.RequestError, match="no linear, convolution or recurrent layer"):
        prune_weights(dc.capture(nn.Sequential(nn.ReLU()), torch.randn(2, 3)), sparsity=0.5)
    gm.fc.weight.data[0, 0] = float("inf")
    with pytest.raises(dc.RequestError, match=r"fc\.weight holds values that are not finite"):
        prune_weights(gm, sparsity=0.5)
