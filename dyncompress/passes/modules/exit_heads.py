"""Exit heads as modules: the smallest classifiers that read a cut point's tensor.

    image   (batch, channels, *space), channels anywhere   a * maxpool + (1 - a) * avgpool to a small grid, linear
    tokens  (batch, time, features)                        the token the model itself reads, LayerNorm, linear
    vector  (batch, features)                              linear

The image head is that of Shallow-Deep Networks (Kaya et al., 2019, section 4.1), where the grid is 4 by 4. Early
features need it: on CIFAR-10 with a frozen ResNet the first of three exits reached .54 with it, .27 with a 1 by 1.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ExitHead(nn.Module):
    """A head from features to (batch, classes) logits; its constructor arguments are plain and kept as attributes."""

    arguments: tuple[str, ...] = ()
    linear: nn.Linear

    def spec(self) -> dict[str, Any]:
        """What rebuilds the head: ``HEADS[spec["type"]](**spec["args"])``, weights aside."""
        return {"type": type(self).__name__, "args": {name: getattr(self, name) for name in self.arguments}}

    @property
    def macs_per_sample(self) -> int:
        """Multiply-accumulates for one sample."""
        return self.linear.in_features * self.linear.out_features

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.arguments)


class ImageHead(ExitHead):
    """Pools by a learned mix of maximum and mean, then a linear layer.

    `channel_dim` is 1 or the last dim. `grid` 1 pools all other dims away; more needs a 4-D map whose sides it divides.
    """

    arguments = ("channels", "classes", "channel_dim", "grid")
    by_windows = False  # the same results, computed as onnxruntime is fastest

    def __init__(self, channels: int, classes: int, channel_dim: int = 1, grid: int = 1) -> None:
        super().__init__()
        self.channels, self.classes, self.channel_dim, self.grid = channels, classes, channel_dim, grid
        self.mix = nn.Parameter(torch.zeros(()))  # a = sigmoid(mix)
        self.linear = nn.Linear(channels * grid**2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ..., channels, ...) features to (batch, classes) logits."""
        if self.channel_dim != 1:
            x = x.movedim(self.channel_dim, 1)
        mean, maximum = self._pooled(x)
        pooled = torch.lerp(mean, maximum, torch.sigmoid(self.mix))
        return self.linear(pooled if self.grid == 1 else pooled.flatten(1))

    def _pooled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and maximum of every cell. At batch 1 each call here takes longer than its arithmetic."""
        if self.grid == 1:
            space = list(range(2, x.dim()))
            return x.mean(space), x.amax(space)
        batch, channels, height, width = x.shape
        mean = F.avg_pool2d(x, (height // self.grid, width // self.grid))
        if self.by_windows:
            return mean, F.max_pool2d(x, (height // self.grid, width // self.grid))
        rows = x.reshape(batch, channels, self.grid, -1, width).amax(3)  # two steps: faster on a CPU than a window
        return mean, rows.reshape(batch, channels, self.grid, self.grid, -1).amax(4)


class TokenHead(ExitHead):
    """Reads the first, the last or the mean token, then LayerNorm and a linear layer."""

    arguments = ("features", "classes", "token")

    def __init__(self, features: int, classes: int, token: str = "mean") -> None:
        super().__init__()
        self.features, self.classes, self.token = features, classes, token
        self.norm = nn.LayerNorm(features)
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, features) to (batch, classes) logits."""
        token = x[:, 0] if self.token == "first" else x[:, -1] if self.token == "last" else x.mean(1)
        return self.linear(self.norm(token))


class VectorHead(ExitHead):
    """One linear layer."""

    arguments = ("features", "classes")

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.features, self.classes = features, classes
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, features) to (batch, classes) logits."""
        return self.linear(x)


HEADS: dict[str, type[ExitHead]] = {kind.__name__: kind for kind in (ImageHead, TokenHead, VectorHead)}
