"""Hard variants of small digits, drawn for a whole batch at once.

Every image draws a level d in 0..1, as the square of a uniform number: half of all images stay below 1/4. All
distortions grow with d, so an early layer can decide most images, and the rest need depth:

    sample  = noise(light(blur(occlude(clutter(warp(glyph))))))
    warp    a rotation, scale, shear and shift, plus a smooth random displacement
    clutter up to three fragments of other digits near the border
    occlude a bar, bright or dark, through the image
    light   less contrast, a brightness ramp, sometimes inverted
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 32

_CLUTTER_SLOTS = 3


def draw(glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """One fresh variant of every glyph: (N, 1, h, w) float in 0..1 -> (N, 1, 32, 32) uint8."""
    glyphs = F.interpolate(glyphs, (SIZE, SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
    dice = _Dice(len(glyphs), generator)
    level = dice.uniform(0, 1) ** 2
    images = _warp(glyphs, level, dice)
    images = _clutter(images, glyphs, level, dice)
    images = _occlude(images, level, dice)
    images = _blur(images, level, dice)
    images = _light(images, level, dice)
    noise = torch.randn(images.shape, generator=generator)
    images = images + noise * (0.02 + 0.1 * level).view(-1, 1, 1, 1)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


class _Dice:
    """Per-image random numbers of shape (N,)."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count = count
        self.generator = generator

    def uniform(self, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(self.count, generator=self.generator)

    def happens(self, probability: Tensor) -> Tensor:
        return self.uniform(0, 1) < probability

    def order(self) -> Tensor:
        return torch.randperm(self.count, generator=self.generator)


def _affine(angle: Tensor, scale: Tensor, shear: Tensor, shift_x: Tensor, shift_y: Tensor) -> Tensor:
    """(N, 2, 3) matrices from output to input coordinates, so that the glyph appears scaled by `scale`."""
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    a, b = cos, -sin + shear * cos
    c, d = sin, cos + shear * sin
    rows = [a, b, -(a * shift_x + b * shift_y), c, d, -(c * shift_x + d * shift_y)]
    return torch.stack(rows, dim=1).view(-1, 2, 3)


def _sample(images: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _warp(glyphs: Tensor, level: Tensor, dice: _Dice) -> Tensor:
    scale = 0.85 - (0.05 + 0.25 * level) * dice.uniform(0, 1)
    room = (1 - scale) * (0.4 + 0.5 * level)
    matrices = _affine(
        angle=dice.uniform(-1, 1) * (0.08 + 0.55 * level),
        scale=scale,
        shear=dice.uniform(-1, 1) * (0.05 + 0.45 * level),
        shift_x=dice.uniform(-1, 1) * room,
        shift_y=dice.uniform(-1, 1) * room,
    )
    grid = F.affine_grid(matrices, [len(glyphs), 1, SIZE, SIZE], align_corners=False)
    coarse = torch.randn(len(glyphs), 2, 4, 4, generator=dice.generator) * (0.1 * level).view(-1, 1, 1, 1)
    bend = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=True)
    return _sample(glyphs, grid + bend.permute(0, 2, 3, 1))


def _clutter(images: Tensor, glyphs: Tensor, level: Tensor, dice: _Dice) -> Tensor:
    for _ in range(_CLUTTER_SLOTS):
        side = dice.uniform(-math.pi, math.pi)
        radius = dice.uniform(0.85, 1.05)
        matrices = _affine(
            angle=dice.uniform(-math.pi, math.pi),
            scale=dice.uniform(0.3, 0.55),
            shear=dice.uniform(-0.3, 0.3),
            shift_x=radius * torch.cos(side),
            shift_y=radius * torch.sin(side),
        )
        grid = F.affine_grid(matrices, [len(glyphs), 1, SIZE, SIZE], align_corners=False)
        fragment = _sample(glyphs[dice.order()], grid)
        strength = dice.happens(level) * dice.uniform(0.5, 1.0)
        images = torch.maximum(images, fragment * strength.view(-1, 1, 1, 1))
    return images


def _occlude(images: Tensor, level: Tensor, dice: _Dice) -> Tensor:
    """A straight bar 1 to 3 pixels wide at a random angle; the distance to its middle line decides each pixel."""
    axis = torch.linspace(-1, 1, SIZE)
    angle, offset = dice.uniform(0, math.pi), dice.uniform(-0.5, 0.5)
    normal_x, normal_y = torch.cos(angle).view(-1, 1, 1), torch.sin(angle).view(-1, 1, 1)
    distance = (normal_x * axis.view(1, 1, -1) + normal_y * axis.view(1, -1, 1) - offset.view(-1, 1, 1)).abs()
    bar = (distance < dice.uniform(0.03, 0.1).view(-1, 1, 1)) & dice.happens(0.7 * level).view(-1, 1, 1)
    value = dice.happens(torch.full((dice.count,), 0.5)).float().view(-1, 1, 1, 1)
    return torch.where(bar.unsqueeze(1), value, images)


def _blur(images: Tensor, level: Tensor, dice: _Dice) -> Tensor:
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    soft = F.conv2d(images, torch.outer(taps, taps).view(1, 1, 5, 5), padding=2)
    share = (level * dice.uniform(0, 1.5)).clamp(max=1).view(-1, 1, 1, 1)
    return torch.lerp(images, soft, share)


def _light(images: Tensor, level: Tensor, dice: _Dice) -> Tensor:
    axis = torch.linspace(-1, 1, SIZE)
    contrast = 1 - 0.5 * level * dice.uniform(0, 1)
    ramp_x, ramp_y = (dice.uniform(-0.25, 0.25) * level for _ in range(2))
    ramp = ramp_x.view(-1, 1, 1, 1) * axis.view(1, 1, 1, -1) + ramp_y.view(-1, 1, 1, 1) * axis.view(1, 1, -1, 1)
    lit = 0.5 + (images - 0.5) * contrast.view(-1, 1, 1, 1) + ramp
    inverted = dice.happens(0.5 * level).view(-1, 1, 1, 1)
    return torch.where(inverted, 1 - lit, lit)
