"""The multi-scale dense network, whose exits are part of the architecture: coarse features exist at every depth.

A layer computes, at every scale, new channels from all earlier channels of that scale, and from the second scale on
half of them from all earlier channels of the next finer scale. The layers are divided into as many parts as there are
scales, and each part but the first leaves out the finest scale of the one before.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...errors import RequestError

_HEAD_WIDTH = 128


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU())


def _bottleneck(channels_in: int, channels_out: int, factor: int, stride: int = 1) -> nn.Sequential:
    inner = min(channels_in, factor * channels_out)
    return nn.Sequential(_conv(channels_in, inner, 1), _conv(inner, channels_out, 3, stride))


class DenseLayer(nn.Module):
    """New channels at one scale behind the old: (B, C, H, W)[, finer (B, C', 2H, 2W)] -> (B, C + growth, H, W)."""

    def __init__(self, channels: int, finer: int | None, growth: int, factor: int) -> None:
        super().__init__()
        from_finer = growth // 2 if finer is not None else 0
        self.same = _bottleneck(channels, growth - from_finer, factor)
        self.down = _bottleneck(finer, from_finer, factor, stride=2) if finer is not None else None

    def forward(self, x: Tensor, finer: Tensor | None) -> Tensor:
        if self.down is None:
            return torch.cat((x, self.same(x)), dim=1)
        return torch.cat((x, self.same(x), self.down(finer)), dim=1)


class MultiScaleLayer(nn.Module):
    """One depth: a list of features, finest first -> the list with more channels, without the `dropped` finest scales.

    channels: of each scale that comes in. first: the number of the finest of them. Where scales are dropped, 1x1
    convolutions then halve the channels of those that stay.
    """

    def __init__(self, channels: list[int], first: int, dropped: int, growth: int) -> None:
        super().__init__()
        self.dropped = dropped
        self.channels: list[int] = []  # of each scale that goes out
        self.scales = nn.ModuleList()
        self.halve = nn.ModuleList()
        for index in range(dropped, len(channels)):
            factor = 2 ** (first + index)
            finer = channels[index - 1] if index else None
            self.scales.append(DenseLayer(channels[index], finer, growth * factor, factor))
            out = channels[index] + growth * factor
            self.halve.append(_conv(out, out // 2, 1) if dropped else nn.Identity())
            self.channels.append(out // 2 if dropped else out)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        made = []
        for index, (scale, halve) in enumerate(zip(self.scales, self.halve, strict=True), start=self.dropped):
            made.append(halve(scale(features[index], features[index - 1] if index else None)))
        return made


def _exit(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        _conv(channels, _HEAD_WIDTH, 3, 2),
        _conv(_HEAD_WIDTH, _HEAD_WIDTH, 3, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(_HEAD_WIDTH, classes),
    )


class AnytimeLogits(NamedTuple):
    """The (B, classes) logits of every early exit, and the network's own answer."""

    early: tuple[Tensor, ...]
    logits: Tensor


class MSDNet(nn.Module):
    """MSDNet in its CIFAR form (Huang et al. 2018): (B, channels, 32, 32) float -> (B, classes) logits of every exit.

    The exits, of which the last is the network's own answer, read the coarsest scale after layer `base`
    and after every `step` layers from there. The default has the paper's 24 layers with 11 exits.

    Raises RequestError for sizes that give fewer layers than scales.
    """

    def __init__(
        self,
        exits: int = 11,
        classes: int = 10,
        channels: int = 3,
        base: int = 4,
        step: int = 2,
        scales: int = 3,
        width: int = 16,
        growth: int = 6,
    ) -> None:
        super().__init__()
        depth = base + step * (exits - 1)
        if min(exits, base, step, scales) < 1 or depth < scales:
            raise RequestError(f"exits={exits}, base={base}, step={step} give {depth} layers for {scales} scales")
        self.exits_after = tuple(range(base, depth + 1, step))
        widths = [width * 2**s for s in range(scales)]
        inputs = [channels, *widths[:-1]]
        self.stem = nn.ModuleList(_conv(inputs[s], widths[s], 3, 1 if s == 0 else 2) for s in range(scales))
        self.layers = nn.ModuleList()
        self.heads = nn.ModuleList()
        first = 0
        for number in range(1, depth + 1):
            finest = (number - 1) * scales // depth  # scale of this layer
            layer = MultiScaleLayer(widths, first, finest - first, growth)
            self.layers.append(layer)
            widths, first = layer.channels, finest
            if number in self.exits_after:
                self.heads.append(_exit(widths[-1], classes))

    def forward(self, x: Tensor) -> AnytimeLogits:
        features = []
        for stem in self.stem:
            x = stem(x)
            features.append(x)
        logits: list[Tensor] = []
        for number, layer in enumerate(self.layers, start=1):
            features = layer(features)
            if number in self.exits_after:
                logits.append(self.heads[len(logits)](features[-1]))
        return AnytimeLogits(tuple(logits[:-1]), logits[-1])
