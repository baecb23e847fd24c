"""One small network per operator family: what is prunable, what is frozen and why, and the masked oracle."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompress as dc
from dyncompress.passes.axes.axes import Axes

conv, linear = nn.Conv2d, nn.Linear
IMAGE, ROWS = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 6)


Case = tuple[nn.Module, Tensor]


class Net(nn.Module):
    """`first` makes features, `middle` is the operator under test, `last` reads them."""

    def __init__(self, first: nn.Module, middle: Callable[..., Tensor], last: nn.Module, **extra: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.extra = nn.ModuleDict(extra)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x), **self.extra))


def images(
    middle: Callable[..., Tensor], channels: int = 8, out: int = 8, **extra: nn.Module
) -> tuple[nn.Module, Tensor]:
    return Net(conv(3, channels, 3), middle, conv(out, 4, 1), **extra), IMAGE


def rows(middle: Callable[..., Tensor], width: int = 8, out: int = 8, **extra: nn.Module) -> Case:
    return Net(linear(6, width), middle, linear(out, 4), **extra), ROWS


class Functional(nn.Module):
    """Parameters used by functional calls, which stay operators."""

    def __init__(self, function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **dict(self.named_parameters(recurse=False)))


# name -> (network and input, sizes of the prunable axes)
FAMILIES: dict[str, tuple[Case, list[int]]] = {
    "conv": (images(lambda x, c: c(x), c=conv(8, 8, 3, padding=1)), [8, 8]),
    "conv functional": (images(lambda x, c: c(x), c=Functional(
        lambda x, w: F.conv2d(x, w, stride=2), w=(8, 8, 2, 2))), [8, 8]),
    "grouped": (images(lambda x, c: c(x), out=4, c=conv(8, 4, 1, groups=2)), [2, 4, 2]),
    "depthwise": (images(lambda x, c: c(x), c=conv(8, 8, 3, groups=8)), [8]),
    "depthwise x2": (images(lambda x, c: c(x), out=16, c=conv(8, 16, 3, groups=8)), [8, 2]),
    "transposed": (images(lambda x, c: c(x), out=6, c=nn.ConvTranspose2d(8, 6, 2, 2)), [8, 6]),
    "transposed grouped": (images(lambda x, c: c(x), out=6, c=nn.ConvTranspose2d(8, 6, 2, 2, groups=2)), [2, 4, 3]),
    "conv1d": (rows(lambda x, c: c(x.transpose(1, 2)).transpose(1, 2), c=nn.Conv1d(8, 8, 3, padding=1)), [8, 8]),
    "matmul": (rows(lambda x, m: m(x), m=Functional(lambda x, w: x @ w, w=(8, 8))), [8, 8]),
    "addmm": (rows(lambda x, m: m(x), m=Functional(
        lambda x, w, b: torch.addmm(b, x.reshape(-1, 8), w).view(x.shape), w=(8, 8), b=(8,))), [8, 8]),
    "bmm": (rows(lambda x: torch.bmm(torch.bmm(x, x.transpose(1, 2)), x)), [8]),
    "einsum": (rows(lambda x, m: m(x), m=Functional(
        lambda x, w: torch.einsum("b...i,oi->b...o", x, w), w=(8, 8))), [8, 8]),
    "attention": (rows(lambda x: F.scaled_dot_product_attention(x, x, x)), [8]),
    "heads": (rows(lambda x: F.scaled_dot_product_attention(
        *[x.unflatten(-1, (4, 2)).transpose(1, 2)] * 3).transpose(1, 2).flatten(2)), [4, 2]),
    "grouped query": ((Net(linear(6, 16), lambda x: F.scaled_dot_product_attention(
        x[..., :8].unflatten(-1, (4, 2)).transpose(1, 2), x[..., 8:12].unflatten(-1, (2, 2)).transpose(1, 2),
        x[..., 12:].unflatten(-1, (2, 2)).transpose(1, 2), enable_gqa=True).transpose(1, 2).flatten(2),
        linear(8, 4)), ROWS), [2, 2, 2, 2]),
    "batch norm": (images(lambda x, n: n(x), n=nn.BatchNorm2d(8)), [8]),
    "layer norm": (rows(lambda x, n: n(x), n=nn.LayerNorm(8)), [8]),
    "rms norm": (rows(lambda x, n: n(x), n=nn.RMSNorm(8)), [8]),
    "group norm": (images(lambda x, n: n(x), n=nn.GroupNorm(2, 8)), [2, 4]),
    "instance norm": (images(lambda x, n: n(x), n=nn.InstanceNorm2d(8, affine=True)), [8]),
    "view flat": ((Net(conv(3, 4, 3), lambda x: x.view(x.shape[0], -1), linear(4 * 36, 4)), IMAGE), [4]),
    "permute": (images(lambda x: x.permute(0, 2, 3, 1).movedim(-1, 1)), [8]),
    "squeeze": (rows(lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1).sum(1).squeeze()), [8]),
    "cat": (images(lambda x, c: torch.cat([x, c(x), x], 1), out=22, c=conv(8, 6, 1)), [8, 6]),
    "stack": (rows(lambda x: torch.stack([x, x * 2], 1).sum(1)), [8]),
    "split": (images(lambda x: torch.cat(x.split([5, 3], 1)[::-1], 1)), [5, 3]),
    "chunk": (images(lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1], out=4), [4]),
    "slice": (images(lambda x: x[:, 2:6], out=4), [2, 4, 2]),
    "interleaved": (rows(lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(2)), [4]),
    "unbind": (rows(lambda x: sum(x.unflatten(-1, (2, 4)).unbind(2)), out=4), [4]),
    "select": (rows(lambda x: x.unflatten(-1, (2, 4))[:, :, 1], out=4), [4]),
    "index": (rows(lambda x: x[:, torch.tensor([0, 2, 2])]), [8]),
    "indexed channels": (images(lambda x: x[:, torch.tensor([0, 2, 4])], out=3), [3]),
    "max pool": (images(lambda x: F.max_pool2d(x, 2)), [8]),
    "pad": (images(lambda x: F.pad(x, (1, 1, 1, 1, 2, 1)), out=11), [8]),
    "reflect": (images(lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")), [8]),
    "interpolate": (images(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")), [8]),
    "pixel shuffle": (images(lambda x: F.pixel_shuffle(x, 2), out=2), [2]),
    "pixel unshuffle": (images(lambda x: F.pixel_unshuffle(x, 2), channels=2, out=8), [2]),
    "unfold": (images(lambda x: F.fold(F.unfold(x, 2, stride=2), 6, 2, stride=2)), [8]),
    "repeat": (images(lambda x: x.repeat(1, 2, 1, 1), out=16), [8]),
    "repeat interleave": (images(lambda x: x.repeat_interleave(2, 1), out=16), [8]),
    "glu": (rows(lambda x: F.glu(x), out=4), [4]),
    "prelu": (images(lambda x, a: a(x), a=nn.PReLU(8)), [8]),
    "elementwise": (images(lambda x: torch.where(x > 0, x, 0.1 * x).clamp(-3, 3) * x.sigmoid()), [8]),
    "softmaxed": (rows(lambda x: x.softmax(-1)), []),
    "argmax": (images(lambda x: x * x.amax(1, keepdim=True)), []),
    "mean": (rows(lambda x: x * x.mean(-1, keepdim=True)), [8]),
    "var": (rows(lambda x: x * x.var(-1, keepdim=True)), [8]),
    "std and mean": (rows(lambda x: x * torch.std_mean(x, -1, correction=0)[0][..., None]), [8]),
    "functional norms": (rows(lambda x, m: m(x), m=Functional(
        lambda x, w, b: F.layer_norm(F.rms_norm(x, (8,), w * 2), (8,), w * 1, b * 1), w=(8,), b=(8,))), [8]),
    "standardised weights": (images(lambda x, m: m(x), out=6, m=Functional(lambda x, w: F.conv2d(x, F.batch_norm(
        w.reshape(1, 6, -1), None, None, training=True, momentum=0.0).reshape_as(w)), w=(6, 8, 3, 3))), [6, 8]),
    "sum": (rows(lambda x: x + x.sum(-1, keepdim=True)), [8]),
    "roll": (rows(lambda x: x.roll(1, 1)), [8]),
    "differences": (rows(lambda x: torch.cat([x, x.diff(dim=1)], 1)), [8]),
    "rolled features": (rows(lambda x: x.roll(1, -1)), []),
    "lstm": (rows(lambda x, r: r(x)[0], out=6, r=nn.LSTM(8, 6, batch_first=True)), [8, 6]),
    "two-way gru": (rows(
        lambda x, r: r(x)[0], out=12, r=nn.GRU(8, 6, 2, batch_first=True, bidirectional=True)), [8, 6, 6, 6, 6]),
    "lstm state": (rows(
        lambda x, r: r(x)[1][0].transpose(0, 1), out=6, r=nn.LSTM(8, 6, 2, batch_first=True)), [8, 6]),
}  # fmt: skip


def half(axes: Axes) -> dict[str, list[int]]:
    return {axis.name: list(range(0, axis.size, 2)) for axis in axes.prunable}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    (model, x), sizes = FAMILIES[name]
    model, x = model.double().eval(), x.double()
    gm = dc.capture(model, x)
    axes = dc.infer_axes(gm)
    assert axes.untyped == {}
    assert [axis.size for axis in axes.prunable] == sizes
    with torch.no_grad():
        masked, small = dc.mask(gm, half(axes)), dc.shrink(gm, half(axes), exact=True)
        torch.testing.assert_close(small(x), masked(x), rtol=1e-9, atol=1e-9)
        assert len(small(torch.cat([x, x, x]))) == 6
        again = half(dc.infer_axes(small))
        twice = dc.shrink(small, again, exact=True)
        torch.testing.assert_close(twice(x), dc.mask(small, again)(x), rtol=1e-9, atol=1e-9)


def test_embedding_rows_stay_and_say_why() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3))
    axes = dc.infer_axes(dc.capture(model, torch.randint(0, 20, (2, 4))))
    assert [a.size for a in axes.prunable] == [8]
    assert "looked up" in axes["0.weight:0"].reason
    assert "output" in axes["1.weight:0"].reason


def test_an_unknown_operator_freezes_and_is_reported_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.renorm(self.b(self.a(x)), 2, 0, 1.0))

    gm = dc.capture(Odd(), torch.randn(2, 6))
    axes = dc.infer_axes(gm)
    assert list(axes.untyped.values()) == ["no rule for aten.renorm.default"]
    assert [a.name for a in axes.prunable] == ["a.weight:0"]
    assert axes["b.weight:0"].reason == "no rule for aten.renorm.default"
    with pytest.raises(dc.RequestError, match="renorm"):
        dc.shrink(gm, {"b.weight:0": [0, 1]})


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ({"nope": [0]}, "no axis named"),
        ({"0.weight:0": []}, "at least one index"),
        ({"0.weight:0": [0, 0]}, "distinct"),
        ({"0.weight:0": [8]}, "0..7"),
        ({"0.weight:0": [0.5]}, "list of indices"),
        ({"1.weight:0": [0]}, "cannot shrink"),
    ],
)
def test_wrong_requests(keep: dict, said: str) -> None:
    gm = dc.capture(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4))
    with pytest.raises(dc.RequestError, match=said):
        dc.shrink(gm, keep)


def test_a_plan_slices_gradients_and_moments_like_the_parameters() -> None:
    gm = dc.capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4))
    optimiser = torch.optim.Adam(gm.parameters())
    gm(torch.randn(5, 4)).square().sum().backward()
    optimiser.step()
    keep = {"0.weight:0": [1, 6]}
    plan = dc.plan(gm, keep)
    small = dc.shrink(gm, keep)
    moments = plan({name: optimiser.state[p]["exp_avg"] for name, p in gm.named_parameters()})
    assert {n: t.shape for n, t in moments.items()} == {n: p.shape for n, p in small.named_parameters()}
    torch.testing.assert_close(moments["2.weight"], optimiser.state[gm.get_parameter("2.weight")]["exp_avg"][:, [1, 6]])
    with pytest.raises(ValueError, match="shape"):
        plan.slice("0.weight", torch.zeros(3))


def test_sizes_in_modules_follow() -> None:
    gm = dc.capture(nn.Sequential(conv(3, 8, 1), nn.BatchNorm2d(8), conv(8, 4, 1)), IMAGE)
    small = dc.shrink(gm, {"0.weight:0": [0, 1, 2]})
    assert "Conv2d(3, 3" in str(small) and "BatchNorm2d(3" in str(small) and "Conv2d(3, 4" in str(small)
    again = dc.shrink(small, {"0.weight:0": [2]})
    assert again(IMAGE).shape == (2, 4, 8, 8)
