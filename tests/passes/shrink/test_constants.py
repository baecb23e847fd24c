"""Constants that removed channels leave behind: the shrunk network equals the original one, bias for bias."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompress as dc


class Net(nn.Module):
    """conv, norm, activation, pool, conv (unpadded or padded), linear."""

    def __init__(self, padding: int = 0, bias: bool = False) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=padding, bias=bias)
        self.fc1, self.fc2 = nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.silu(self.norm(self.conv1(x))), 2)
        x = F.relu(self.conv2(x)).mean((2, 3))
        return self.fc2(torch.sigmoid(self.fc1(x)))


def silenced(padding: int = 0, bias: bool = False) -> tuple[torch.fx.GraphModule, Tensor]:
    """A network with channels 1 and 4 of the norm, and unit 2 of fc1, at a constant other than zero."""
    torch.manual_seed(0)
    model, x = Net(padding, bias), torch.randn(4, 3, 12, 12, dtype=torch.float64)
    model.double()(x)
    with torch.no_grad():
        model.norm.weight[[1, 4]] = 0.0
        model.norm.bias[[1, 4]] = torch.tensor([0.7, -0.4]).double()
        model.fc1.weight[2] = 0.0
    return dc.capture(model.eval(), x), x


CHANNELS, UNITS = {"norm.weight:0": [0, 2, 3, 5]}, {"fc1.weight:0": [0, 1, 3, 4, 5, 6]}


def named(gm: torch.fx.GraphModule, keep: dict[str, list[int]]) -> dict[str, list[int]]:
    """The keep of the axes that hold these slices."""
    axes = dc.infer_axes(gm)
    where = {f"{p.tensor}:{p.dim}": axis.name for axis in axes for p in axis.slices}
    return {where[name]: indices for name, indices in keep.items()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keep", [CHANNELS, UNITS, CHANNELS | UNITS])
def test_what_is_constant_is_not_lost(keep: dict[str, list[int]], bias: bool) -> None:
    gm, x = silenced(bias=bias)
    small = dc.shrink(gm, named(gm, keep), exact=True)
    torch.testing.assert_close(small(x), gm(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(dc.shrink(gm, named(gm, keep))(x), gm(x), atol=1e-6)


def test_a_constant_at_a_padded_border_cannot_be_a_bias() -> None:
    gm, x = silenced(padding=1)
    keep = named(gm, CHANNELS)
    assert dc.shrink(gm, keep, exact=True).conv2.bias is None
    torch.testing.assert_close(dc.shrink(gm, keep, exact=True)(x), dc.mask(gm, keep)(x), rtol=1e-12, atol=1e-12)


def test_channels_that_vary_are_dropped_beside_constant_ones() -> None:
    gm, x = silenced()
    keep = named(gm, {"norm.weight:0": [0, 2, 3]})  # 5 varies
    reference = dc.capture(Net().double().eval(), x)
    reference.load_state_dict(gm.state_dict())
    with torch.no_grad():
        reference.conv2.weight[:, 5] = 0.0
    torch.testing.assert_close(dc.shrink(gm, keep, exact=True)(x), reference(x), rtol=1e-12, atol=1e-12)


def test_a_folded_model_still_trains_and_saves(tmp_path: object) -> None:
    gm, x = silenced()
    small = dc.shrink(gm, named(gm, CHANNELS), exact=True)
    small.train()(x).sum().backward()
    assert small.conv2.bias.grad is not None
    dc.save(small.eval(), f"{tmp_path}/small.dyn.safetensors")
    assert torch.equal(dc.load(f"{tmp_path}/small.dyn.safetensors")(x), small(x))
