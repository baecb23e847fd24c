"""Folded batch norms: the same function with fewer calls, and left alone where that cannot be."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompress as dc
from dyncompress.passes.graph.cost import count_macs


class Normed(nn.Module):
    """One of each kind that folds, and four that must not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.up, self.up_bn = nn.ConvTranspose2d(8, 6, 2, bias=False), nn.BatchNorm2d(6, affine=False)
        self.groups, self.groups_bn = nn.ConvTranspose2d(6, 6, 2, groups=2), nn.BatchNorm2d(6)
        self.twice, self.twice_bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.read, self.read_bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.fc, self.fc_bn = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.free_bn = nn.BatchNorm1d(5, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_bn(self.up(F.relu(self.conv_bn(self.conv(x)))))
        x = self.groups_bn(self.groups(x))
        x = self.twice_bn(self.twice(F.relu(self.twice(x))))
        y = self.read(x)
        x = F.relu(self.read_bn(y)) + y
        return self.free_bn(self.fc_bn(self.fc(x.mean((2, 3)))))


@pytest.fixture
def gm() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    model = Normed().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return dc.capture(model.eval(), torch.randn(2, 3, 7, 7, dtype=torch.float64))


def test_the_same_function_with_fewer_calls(gm: torch.fx.GraphModule) -> None:
    result = dc.FoldBatchNorm()(gm)
    assert result.modified and result.report.folded == ("conv_bn", "up_bn", "fc_bn")
    x = torch.randn(5, 3, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(result.gm(x), gm(x))
    names = {name for name, _ in result.gm.named_modules()}
    assert not {"conv_bn", "up_bn", "fc_bn"} & names and {"groups_bn", "twice_bn", "read_bn", "free_bn"} <= names
    assert count_macs(result.gm) == count_macs(gm) and {"conv_bn", "up_bn"} <= {n for n, _ in gm.named_modules()}


def test_what_is_folded_shrinks_like_anything_else(gm: torch.fx.GraphModule) -> None:
    folded = dc.FoldBatchNorm()(gm).gm
    keep = {axis.name: range(0, axis.size, 2) for axis in dc.infer_axes(folded).prunable}
    x = torch.randn(5, 3, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(dc.shrink(folded, keep, exact=True)(x), dc.mask(folded, keep)(x))


def test_not_while_training(gm: torch.fx.GraphModule) -> None:
    with pytest.raises(dc.RequestError, match="eval"):
        dc.FoldBatchNorm()(gm.train())


def test_nothing_to_fold() -> None:
    result = dc.FoldBatchNorm()(dc.capture(nn.Sequential(nn.Linear(3, 2)).eval(), torch.randn(2, 3)))
    assert not result.modified and result.report.folded == ()
