"""Random networks made of typed operators, one per seed: convolutional, attending, recurrent and mixed.

Activations in front of norms keep zero at zero, so that a zeroed slice contributes nothing and the masked network is an
exact reference for the shrunk one.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ZERO_KEEPING = (F.relu, F.gelu, F.silu, torch.tanh, F.leaky_relu, F.hardswish)


class Program(nn.Module):
    """Runs a list of steps on one value; a step owns modules and may look back at earlier values."""

    def __init__(self, steps: list[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class Fn(nn.Module):
    """A plain function as a step."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Branches(nn.Module):
    """Joins several branches of one input by `join`: a residual sum, a concatenation, a gate."""

    def __init__(self, join: Callable[..., Tensor], *branches: nn.Module) -> None:
        super().__init__()
        self.join, self.branches = join, nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(*(branch(x) for branch in self.branches))


def image_step(r: random.Random, c: int) -> tuple[nn.Module, int]:
    """One step on (B, c, H, W) features and the channels it returns."""
    kind = r.choice(
        ["conv", "grouped", "depthwise", "residual", "residual", "dense", "se", "norm", "shuffle", "split", "glu",
         "transposed", "pixel", "pool", "act", "parallel", "slice", "permute"]
    )  # fmt: skip
    out = r.choice([4, 6, 8, 12])
    act = Fn(r.choice(ZERO_KEEPING))
    if kind == "conv":
        return nn.Sequential(nn.Conv2d(c, out, 3, padding=1, bias=r.random() < 0.5), norm(r, out), act), out
    if kind == "grouped":
        groups = r.choice([g for g in (1, 2, 3, 4) if c % g == 0])
        return nn.Conv2d(c, groups * 3, 1, groups=groups), groups * 3
    if kind == "depthwise":
        times = r.choice([1, 2])
        return nn.Sequential(nn.Conv2d(c, c * times, 3, padding=1, groups=c), act), c * times
    if kind == "residual":
        inner = nn.Sequential(nn.Conv2d(c, out, 1), norm(r, out), act, nn.Conv2d(out, c, 3, padding=1), norm(r, c))
        return Branches(lambda a, b: F.relu(a + b), inner, nn.Identity()), c
    if kind == "dense":
        return Branches(lambda a, b: torch.cat([a, b], 1), nn.Identity(), nn.Conv2d(c, out, 1)), c + out
    if kind == "parallel":
        branches = [nn.Conv2d(c, n, 1) for n in (out, 4, 2)]
        return Branches(lambda *parts: torch.cat(parts, 1), *branches), out + 6
    if kind == "se":
        gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, 4, 1), nn.ReLU(), nn.Conv2d(4, c, 1), nn.Sigmoid())
        return Branches(torch.mul, nn.Identity(), gate), c
    if kind == "shuffle" and c % 2 == 0:
        return nn.Sequential(nn.Conv2d(c, c, 1), Fn(lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))), c
    if kind == "split" and c >= 4:
        sizes = [c // 3, c - c // 3]
        return nn.Sequential(nn.Conv2d(c, c, 1), Fn(lambda x: torch.cat(x.split(sizes, 1)[::-1], 1))), c
    if kind == "glu":
        return nn.Sequential(nn.Conv2d(c, 2 * out, 1), nn.GLU(1)), out
    if kind == "transposed":
        return nn.Sequential(nn.ConvTranspose2d(c, out, 2, stride=2), nn.MaxPool2d(2)), out
    if kind == "pixel":
        return nn.Sequential(nn.Conv2d(c, 4 * 3, 1), nn.PixelShuffle(2), nn.AvgPool2d(2)), 3
    if kind == "pool":
        return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.MaxPool2d(3, 2, 1)), c
    if kind == "slice" and c >= 4:
        cut = r.randrange(1, c - 1)
        return nn.Sequential(nn.Conv2d(c, c, 1), Fn(lambda x: x[:, cut:])), c - cut
    if kind == "permute":
        channels_last = nn.Sequential(
            Fn(lambda x: x.permute(0, 2, 3, 1)), nn.LayerNorm(c), nn.Linear(c, out), act, nn.Linear(out, c)
        )
        return nn.Sequential(nn.Conv2d(c, c, 1), channels_last, Fn(lambda x: x.permute(0, 3, 1, 2))), c
    if kind == "norm":
        return nn.Sequential(nn.Conv2d(c, c, 1), norm(r, c)), c
    return act, c


def norm(r: random.Random, c: int) -> nn.Module:
    """A normalisation of c channels."""
    kind = r.choice(["batch", "batch", "group", "instance", "none"])
    if kind == "group":
        return nn.GroupNorm(r.choice([g for g in (1, 2, 3, 4) if c % g == 0]), c)
    return {"batch": nn.BatchNorm2d(c), "instance": nn.InstanceNorm2d(c, affine=True), "none": nn.Identity()}[kind]


class Attention(nn.Module):
    """Self-attention in one of the usual spellings: fused or separate projections, grouped queries, by hand or not."""

    def __init__(self, r: random.Random, width: int) -> None:
        super().__init__()
        self.style = r.choice(["fused", "chunked", "separate", "grouped", "by-hand", "einsum"])
        self.heads, self.head_dim = r.choice([2, 4]), r.choice([2, 3])
        inner = self.heads * self.head_dim
        self.inner, self.kv_heads = inner, 2 if self.style == "grouped" else self.heads
        if self.style in {"fused", "chunked"}:
            self.qkv = nn.Linear(width, 3 * inner)
        else:
            self.q = nn.Linear(width, inner)
            self.k = nn.Linear(width, self.kv_heads * self.head_dim)
            self.v = nn.Linear(width, self.kv_heads * self.head_dim)
        self.out = nn.Linear(inner, width)

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.style == "fused":
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.style == "chunked":
            q, k, v = (self._heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        else:
            q = self._heads(self.q(x), self.heads)
            k, v = self._heads(self.k(x), self.kv_heads), self._heads(self.v(x), self.kv_heads)
        if self.style == "grouped":
            times = self.heads // self.kv_heads
            k = k[:, :, None].expand(b, self.kv_heads, times, n, self.head_dim).reshape(b, self.heads, n, self.head_dim)
            v = v.repeat_interleave(times, 1)
        if self.style == "by-hand":
            y = ((q @ k.transpose(-1, -2)) / self.head_dim**0.5).softmax(-1) @ v
        elif self.style == "einsum":
            weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
            y = torch.einsum("bhqk,bhkd->bhqd", weights, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, self.inner))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Tokens(nn.Module):
    """Class token and position embedding in front of (B, n, width) tokens."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, n + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position


def token_step(r: random.Random, width: int) -> nn.Module:
    """A residual step on (B, n, width) tokens."""
    hidden = r.choice([6, 8, 10])
    kind = r.choice(["attention", "attention", "mlp", "gated", "mixer"])
    normed = r.choice([nn.LayerNorm(width), nn.RMSNorm(width), nn.Identity()])
    branch: nn.Module
    if kind == "attention":
        branch = Attention(r, width)
    elif kind == "gated":
        branch = GatedMLP(width, hidden)
    else:
        branch = nn.Sequential(nn.Linear(width, hidden), Fn(r.choice(ZERO_KEEPING)), nn.Linear(hidden, width))
    return Branches(torch.add, nn.Identity(), nn.Sequential(normed, branch))


class Recurrent(nn.Module):
    """An LSTM, GRU or RNN stack over (B, T, features)."""

    def __init__(self, r: random.Random, inp: int, hidden: int) -> None:
        super().__init__()
        kind: Any = r.choice([nn.LSTM, nn.LSTM, nn.GRU, nn.RNN])
        self.batch_first, two_ways = r.random() < 0.5, r.random() < 0.4
        proj = {"proj_size": hidden - 2} if kind is nn.LSTM and r.random() < 0.3 else {}
        self.layer = kind(
            inp,
            hidden,
            r.choice([1, 2]),
            batch_first=self.batch_first,
            bidirectional=two_ways,
            bias=r.random() < 0.8,
            **proj,
        )
        self.width = (proj.get("proj_size") or hidden) * (2 if two_ways else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_first:
            return self.layer(x)[0]
        return self.layer(x.transpose(0, 1))[0].transpose(0, 1)


def image_network(r: random.Random) -> tuple[nn.Module, Tensor]:
    """Convolutions, then pooled or flattened features, then a linear head."""
    c = r.choice([4, 6, 8])
    steps: list[nn.Module] = [nn.Conv2d(3, c, 3, padding=1)]
    for _ in range(r.randint(2, 6)):
        step, c = image_step(r, c)
        steps.append(step)
    if r.random() < 0.5:
        steps += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 5)]
    else:
        steps += [nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(4 * c, 7), nn.ReLU(), nn.Linear(7, 5)]
    return Program(steps), torch.randn(2, 3, 8, 8)


def token_network(r: random.Random) -> tuple[nn.Module, Tensor]:
    """Embedded ids or projected features, attention and MLP blocks, a class token or a mean."""
    width = r.choice([6, 8, 12])
    embedded = r.random() < 0.5
    steps: list[nn.Module] = [nn.Embedding(11, width) if embedded else nn.Linear(4, width)]
    token = r.random() < 0.5
    if token:
        steps.append(Tokens(5, width))
    steps += [token_step(r, width) for _ in range(r.randint(1, 4))]
    steps += [Fn(lambda x: x[:, 0]) if token else Fn(lambda x: x.mean(1)), nn.Linear(width, 5)]
    return Program(steps), torch.randint(0, 11, (2, 5)) if embedded else torch.randn(2, 5, 4)


def recurrent_network(r: random.Random) -> tuple[nn.Module, Tensor]:
    """Recurrent stacks with linear or residual steps between them; the last step is classified."""
    width = r.choice([4, 6])
    steps: list[nn.Module] = [nn.Linear(3, width)]
    for _ in range(r.randint(1, 2)):
        layer = Recurrent(r, width, r.choice([4, 6, 8]))
        width = layer.width
        steps.append(layer)
        if r.random() < 0.5:
            steps.append(token_step(r, width))
    steps += [Fn(lambda x: x[:, -1]), nn.Linear(width, 5)]
    return Program(steps), torch.randn(2, 6, 3)


def mixed_network(r: random.Random) -> tuple[nn.Module, Tensor]:
    """A convolutional stem whose positions become tokens or time steps."""
    c = r.choice([4, 6, 8])
    steps: list[nn.Module] = [nn.Conv2d(3, c, 2, 2)]
    for _ in range(r.randint(0, 2)):
        step, c = image_step(r, c)
        steps.append(step)
    steps += [nn.AdaptiveAvgPool2d(2), Fn(lambda x: x.flatten(2).transpose(1, 2))]
    if r.random() < 0.5:
        steps += [token_step(r, c), Fn(lambda x: x.mean(1))]
    else:
        layer = Recurrent(r, c, 6)
        c = layer.width
        steps += [layer, Fn(lambda x: x[:, -1])]
    return Program([*steps, nn.Linear(c, 5)]), torch.randn(2, 3, 8, 8)


FAMILIES = (image_network, image_network, token_network, recurrent_network, mixed_network)


def network(seed: int) -> tuple[nn.Module, Tensor]:
    """The network of this seed, in eval mode and float64, with random statistics in its norms, and an input."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    model, x = FAMILIES[seed % len(FAMILIES)](r)
    norms = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.RMSNorm)
    for module in (m for m in model.modules() if isinstance(m, norms)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(module, name, None)
            if value is not None:
                value.data.uniform_(0.5, 1.5)
    return model.double().eval(), x.double() if x.is_floating_point() else x
