"""Gates: small modules from what enters a branch to one logit per sample, the log-odds that the branch runs.

pooled     ConvNet-AIG's (Veit & Belongie, ECCV 2018): mean, linear to 16, BatchNorm, ReLU, linear
ff1, ff2   SkipNet's feed-forward gates (Wang et al., ECCV 2018, section 3.2): convolutions on the map, then the mean
recurrent  SkipNet's recurrent gate: mean, linear to 10, BatchNorm, one LSTM cell that all gates share, linear
policy     BlockDrop's (Wu et al., CVPR 2018): one network decides all branches before the first of them

A softmax over two logits depends on their difference only; the one logit here is that difference. Without a BatchNorm
gates see what all samples have in common, and learn to be always open or always closed.
"""

import math

import torch
from torch import Tensor, nn

from .multi_layer_heads import channel_means

_POOLED, _CELL, _POLICY = 16, 10, 32  # widths: ConvNet-AIG's, SkipNet's, ours
OPEN_AT_FIRST = 0.85  # of the samples, before a gate has learned anything (ConvNet-AIG)


def last_layer(features: int, gates: int = 1) -> nn.Linear:
    """The layer that gives logits, its bias such that gates begin open."""
    layer = nn.Linear(features, gates)
    nn.init.constant_(layer.bias, math.log(OPEN_AT_FIRST / (1 - OPEN_AT_FIRST)))
    return layer


class PooledGate(nn.Module):
    """(batch, ..., channels, ...) to logits (batch,)."""

    def __init__(self, channels: int, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.squeeze = nn.Linear(channels, _POOLED)
        self.norm = nn.BatchNorm1d(_POOLED)
        self.out = last_layer(_POOLED)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.squeeze(channel_means(x, self.channel_dim))))).squeeze(1)


class ConvGate(nn.Module):
    """(batch, channels, height, width) to logits (batch,): `layers` convolutions, the last of stride 2, then the mean.

    Two of them come after a maximum over 2 x 2, where the map is that large.
    """

    def __init__(self, channels: int, channel_dim: int, side: int, layers: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.pool = nn.MaxPool2d(2) if layers > 1 and side > 1 else nn.Identity()
        self.convs = nn.Sequential(
            *[part for i in range(layers) for part in _conv(channels, stride=2 if i == layers - 1 else 1)]
        )
        self.out = last_layer(channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.channel_dim == 3:
            x = x.permute(0, 3, 1, 2)
        return self.out(self.convs(self.pool(x)).mean((2, 3))).squeeze(1)


def _conv(channels: int, channels_out: int | None = None, stride: int = 1) -> list[nn.Module]:
    width = channels_out or channels
    return [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


class Embedding(nn.Module):
    """What the recurrent gate reads of a branch's input: (batch, ..., channels, ...) to (batch, 10)."""

    def __init__(self, channels: int, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.linear = nn.Linear(channels, _CELL)
        self.norm = nn.BatchNorm1d(_CELL)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(channel_means(x, self.channel_dim)))


class RecurrentGate(nn.Module):
    """One step of an LSTM cell and its logit; gates, cell and hidden state are those of `torch.nn.LSTMCell`.

    (batch, 10), the state (batch, 20) that the gate before left, or none, to (batch, 21): state and logit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(_CELL, 4 * _CELL)
        self.hidden = nn.Linear(_CELL, 4 * _CELL, bias=False)
        self.out = last_layer(_CELL)
        with torch.no_grad():  # or the logit would begin anywhere: the cell's output is in -1..1
            self.out.weight.mul_(0.1)

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        gates = self.input(x)
        if before is not None:
            gates = gates + self.hidden(before[:, :_CELL])
        i, f, g, o = gates.chunk(4, 1)
        cell = torch.sigmoid(i) * torch.tanh(g)
        if before is not None:
            cell = cell + torch.sigmoid(f) * before[:, _CELL : 2 * _CELL]
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        return torch.cat((hidden, cell, self.out(hidden)), 1)


class PolicyNetwork(nn.Module):
    """What enters the first branch to the logits of all: (batch, ..., channels, ...) to (batch, gates).

    Maps: the mean over 2 x 2, two convolutions of stride 2, the mean. Tokens and vectors: the mean, a hidden layer.
    """

    def __init__(self, channels: int, channel_dim: int, dims: int, side: int, gates: int) -> None:
        super().__init__()
        self.channel_dim, self.image = channel_dim, dims == 4
        width = 2 * _POLICY if self.image else max(_POLICY, channels // 4)
        if self.image:
            self.pool = nn.AvgPool2d(2) if side > 1 else nn.Identity()
            self.hidden: nn.Module = nn.Sequential(*_conv(channels, _POLICY, 2), *_conv(_POLICY, 2 * _POLICY, 2))
        else:
            self.hidden = nn.Sequential(nn.Linear(channels, width), nn.BatchNorm1d(width), nn.ReLU())
        self.out = last_layer(width, gates)

    def forward(self, x: Tensor) -> Tensor:
        if not self.image:
            return self.out(self.hidden(channel_means(x, self.channel_dim)))
        if self.channel_dim == 3:
            x = x.permute(0, 3, 1, 2)
        return self.out(self.hidden(self.pool(x)).mean((2, 3)))
