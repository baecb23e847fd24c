"""dc.verify: equal models are called equal; a planted difference is found where it was planted."""

import pytest
import torch
from cases import every_second
from torch import Tensor, nn

import dyncompress as dc
from dyncompress.model_zoo.zoo import build, example_input


def case(name: str, exact: bool = True) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule, dict[str, list[int]]]:
    torch.manual_seed(0)
    gm = dc.capture(build(name).eval(), example_input(name))
    keep = every_second(gm)
    return gm, dc.shrink(gm, keep, exact=exact), keep


@pytest.mark.parametrize("name", ["resnet-digits", "vit-digits", "lstm-digits"])
def test_a_shrunk_model_is_called_equal(name: str) -> None:
    gm, small, keep = case(name)
    found = dc.verify(gm, small, keep)
    assert found.ok and found.differences == () and found.error < 1e-4
    assert str(found).startswith("equal")
    assert dc.verify(gm.double(), small.double(), keep, tolerance=1e-9).ok


def test_it_runs_on_inputs_of_the_users_and_leaves_the_models_alone() -> None:
    gm, small, keep = case("resnet-digits")
    gm.train()
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    assert dc.verify(gm, small, keep, example_input("resnet-digits")).ok
    assert gm.training and all(torch.equal(before[k], v) for k, v in gm.state_dict().items())


def test_a_planted_difference_is_found_where_it_is() -> None:
    gm, small, keep = case("resnet-digits")
    name = [n for n, m in small.named_modules() if isinstance(m, nn.Conv2d)][4]
    with torch.no_grad():
        small.get_submodule(name).weight.mul_(1.01)
    found = dc.verify(gm, small, keep)
    first = found.differences[0]
    at = next(n for n in gm.graph.nodes if n.name == first.node)
    assert not found.ok and at.target == name and first.error == pytest.approx(0.01, rel=1e-3)
    assert first.node in str(found)


def test_a_changed_count_is_named_as_the_reason() -> None:
    gm, small, keep = case("vit-digits", exact=False)
    found = dc.verify(gm, small, keep)
    assert not found.ok and "exact=True" in str(found)


def test_not_a_number_is_a_difference() -> None:
    gm, small, keep = case("resnet-digits")
    with torch.no_grad():
        next(iter(small.parameters())).fill_(torch.nan)
    assert not dc.verify(gm, small, keep).ok


def test_wrong_requests_are_refused() -> None:
    gm, small, keep = case("resnet-digits")
    with pytest.raises(dc.RequestError, match="Linear"):
        dc.verify(gm, nn.Linear(2, 2), keep)  # type: ignore[arg-type]
    with pytest.raises(dc.RequestError, match="no axis named"):
        dc.verify(gm, small, {"nothing": [0]})
    with pytest.raises(dc.RequestError, match="shape"):
        dc.verify(gm, small, keep, torch.zeros(1, 2, 3))


class Mixer(nn.Module):
    """Mixes tokens with a bias: it adds that bias to removed channels as well, before the next norm averages them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(5, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.tokens, self.channels, self.head = nn.Linear(6, 6), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.channels(self.norm2(x)))


def test_what_mixing_tokens_adds_to_removed_channels_still_counts(tmp_path: object) -> None:
    torch.manual_seed(0)
    gm = dc.capture(Mixer().double().eval(), torch.randn(2, 6, 5, dtype=torch.float64))
    width = next(axis.name for axis in dc.infer_axes(gm) if axis.kind == "residual width")
    keep = {width: [0, 2, 3, 7]}
    small = dc.shrink(gm, keep, exact=True)
    assert dc.verify(gm, small, keep).ok and not dc.verify(gm, dc.shrink(gm, keep), keep).ok
    again = {next(axis.name for axis in dc.infer_axes(small) if axis.kind == "residual width"): [1, 2]}
    smaller = dc.shrink(small, again, exact=True)
    assert dc.verify(small, smaller, again).ok
    dc.save(smaller, f"{tmp_path}/m.dyn.safetensors")
    assert dc.verify(small, dc.load(f"{tmp_path}/m.dyn.safetensors"), again).ok  # type: ignore[arg-type]


def test_buffers_that_are_not_saved_stay_so() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
            self.register_buffer("scale", torch.arange(1.0, 7.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.fc(x) * self.scale)

    gm = dc.capture(Scaled().eval(), torch.randn(2, 4))
    small = dc.shrink(gm, {"fc.weight:0": [0, 5]})
    assert small.scale.tolist() == [1.0, 6.0]  # type: ignore[union-attr]
    assert "scale" not in small.state_dict() and "scale" not in dc.mask(gm, {}).state_dict()
