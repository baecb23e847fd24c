"""Residual branches: which are found, and that removing one equals zeroing it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompress as dc
from dyncompress.model_zoo.zoo import build, example_input


class Block(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))) with in-place activations, as ResNets write it."""

    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__()
        out = out or width
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(width, out, 1) if out != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.skip(x)
        return F.relu_(y)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.stage1 = nn.Sequential(Block(6), Block(6))
        self.stage2 = nn.Sequential(Block(6, 8), Block(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first = self.stage1(x)
        return self.head(self.stage2(first).mean((2, 3))) + first.mean() + x.mean()


def net() -> tuple[torch.fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 9, 9)
    model(x)
    return dc.capture(model.eval().double(), x.double()), x.double()


def branches(gm: torch.fx.GraphModule) -> list[str]:
    return [axis.name for axis in dc.infer_axes(gm) if axis.kind == "branch"]


def test_every_block_is_an_axis_of_one_index() -> None:
    gm, _ = net()
    assert branches(gm) == ["stage1.0:branch", "stage1.1:branch", "stage2.0:branch", "stage2.1:branch"]
    axis = dc.infer_axes(gm)["stage1.0:branch"]
    assert axis.size == 1 and axis.prunable
    names = {piece.tensor for piece in axis.slices}
    expected = {name for name, t in gm.state_dict().items() if name.startswith("stage1.0.") and t.dim()}
    assert names == expected


def test_the_costlier_addend_of_a_downsampling_block_is_the_branch() -> None:
    gm, _ = net()
    small = dc.shrink(gm, {"stage2.0:branch": []})
    assert "stage2.0.skip.weight" in small.state_dict() and "stage2.0.conv1.weight" not in small.state_dict()


@pytest.mark.parametrize(
    "names", [["stage1.0:branch"], ["stage1.1:branch", "stage2.1:branch"], ["stage1"], ["stage2.1"]]
)
def test_removing_equals_zeroing_and_a_plain_rewrite(names: list[str]) -> None:
    gm, x = net()
    keep: dict[str, list[int]] = {name: [] for name in names}
    small, full, start = dc.shrink(gm, keep), gm(x), x.clone()
    torch.testing.assert_close(small(x), dc.mask(gm, keep)(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(small(x), full) and torch.equal(x, start)
    model = Net()
    model.load_state_dict(gm.state_dict())
    model.eval().double()
    for name, block in [(n, b) for n, b in model.named_modules() if isinstance(b, Block)]:
        if any(f"{name}:branch" == n or name.startswith(f"{n}.") or name == n for n in names):
            for module in (block.conv2, block.bn2):
                for p in module.parameters():
                    nn.init.zeros_(p)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_the_tensors_and_modules_of_a_branch_are_gone_and_plans_leave_them_out() -> None:
    gm, _ = net()
    small = dc.shrink(gm, {"stage1": []})
    assert not any(name.startswith("stage1") for name in small.state_dict())
    assert "stage1" not in dict(small.named_children())
    sliced = dc.plan(gm, {"stage1": []})(dict(gm.named_parameters()))
    assert sliced.keys() == dict(small.named_parameters()).keys()
    with pytest.raises(ValueError, match="branch is removed"):
        dc.plan(gm, {"stage1": []}).slice("stage1.0.conv1.weight", torch.zeros(6, 6, 3, 3))


def test_branches_go_together_with_channels_and_inside_each_other() -> None:
    gm, x = net()
    axes = dc.infer_axes(gm)
    keep: dict[str, list[int]] = {"stage1.0:branch": [], "stage2": []}
    keep |= {axis.name: list(range(0, axis.size, 2)) for axis in axes.prunable if axis.kind != "branch"}
    small = dc.shrink(gm, keep, exact=True)
    torch.testing.assert_close(small(x), dc.mask(gm, keep)(x), rtol=1e-12, atol=1e-12)
    assert branches(small) == ["stage1.1:branch"]
    small.train()(x).sum().backward()


class NotBranches(nn.Module):
    """Sums that are no residual branches: embeddings, a sigmoid that is never zero, a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.gate, self.shared = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(6))
        x = x + torch.sigmoid(self.gate(x))
        x = x + self.shared(x)
        return x + self.shared(x)


def test_other_sums_are_not_taken_for_branches() -> None:
    gm = dc.capture(NotBranches().eval(), torch.randint(0, 20, (2, 6)))
    assert branches(gm) == []


def test_a_branch_of_everything_or_a_wrong_name_is_refused() -> None:
    gm, _ = net()
    with pytest.raises(dc.RequestError, match="no axis named 'stage9'"):
        dc.shrink(gm, {"stage9": []})
    with pytest.raises(dc.RequestError, match="at least one index has to stay"):
        dc.shrink(gm, {"stage1.0.conv1.weight:0": []})


def test_every_layer_of_a_vision_transformer_can_go() -> None:
    gm = dc.capture(build("vit-digits"), x := example_input("vit-digits"))
    names = branches(gm)
    small = dc.shrink(gm, {name: [] for name in names})
    torch.testing.assert_close(small(x), dc.mask(gm, {name: [] for name in names})(x))
    assert len(names) % 2 == 0 and not any("mlp" in name for name, _ in small.named_parameters())
