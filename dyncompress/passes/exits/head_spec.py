"""Exit heads: the smallest classifier that reads a cut point's tensor, chosen from its shape and dim types.

    image   (batch, channels, *space), channels anywhere   a * maxpool + (1 - a) * avgpool to a small grid, linear
    tokens  (batch, time, features)                        the token the model itself reads, LayerNorm, linear
    vector  (batch, features)                              linear

The image head is that of Shallow-Deep Networks (Kaya et al., 2019, section 4.1), where the grid is 4 by 4. Early
features need it: on CIFAR-10 with a frozen ResNet the first of three exits reached .54 with it, .27 with a 1 by 1.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..dims.dims import resolve
from ..dims.type_graph import Typing

aten = torch.ops.aten


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


def head_spec(types: Typing, node: fx.Node, logits: Tensor, most_weights: int) -> dict[str, Any] | None:
    """The `spec` of the head for a cut at `node`; None where the tensor is no floating-point feature map.

    An image head has the finest grid, up to 4 by 4, that needs no more than `most_weights`. Where the `logits` have
    positions, the features must have the same ones.
    """
    val, classes = node.meta["val"], logits.shape[-1]
    if not val.is_floating_point() or val.dim() < 2:
        return None
    if logits.dim() == 3:
        fits = val.dim() == 3 and val.shape[1] == logits.shape[1] and channel_dim(types, node) == 2
        return {"type": "PositionHead", "args": {"features": val.shape[2], "classes": classes}} if fits else None
    if val.dim() == 2:
        return {"type": "VectorHead", "args": {"features": val.shape[1], "classes": classes}}
    dim = channel_dim(types, node)
    if not dim:
        return None
    size = val.shape[dim]
    if val.dim() == 3 and dim == 2:
        token = _token_read(node)
        return {"type": "TokenHead", "args": {"features": size, "classes": classes, "token": token}}
    space = [s for d, s in enumerate(val.shape) if d not in (0, dim)]
    grid = _finest_grid(space, most_weights // (size * classes))
    args = {"channels": size, "classes": classes, "channel_dim": dim, "grid": grid}
    return {"type": "ImageHead", "args": args}


def _finest_grid(space: list[int], most_cells: int) -> int:
    if len(space) != 2:
        return 1
    return next((g for g in (4, 2) if g * g <= most_cells and not any(s % g for s in space)), 1)


def channel_dim(types: Typing, node: fx.Node) -> int | None:
    """The dim that holds what a layer puts out: the dim 0 of some weight, bias or scale, whole.

    A map that is flattened into a classifier shares its height and width with that weight too, never as its outputs.
    """
    outputs = {resolve(dims[0]) for dims in types.params.values() if dims}
    dims = [resolve(d) for d in types.of(node)]
    hits = [i for i, d in enumerate(dims) if i > 0 and d.size > 1 and d in outputs]
    return hits[-1] if hits else types.feature_dim(node)


def _token_read(node: fx.Node) -> str:
    """ "first" or "last" where the model itself reads just that token of `node` or of what follows; else "mean"."""
    length = node.meta["val"].shape[1]
    queue, seen = [node], {node}
    while queue:
        current = queue.pop()
        for user in current.users:
            token = _reads(user, current, length)
            if token:
                return token
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return "mean"


def _reads(user: fx.Node, tokens: fx.Node, length: int) -> str | None:
    val = tokens.meta.get("val")
    if tokens.op == "call_module" and isinstance(val, tuple) and user.args[1] == 1:
        return "last"  # the final state of a recurrent layer
    if not isinstance(val, Tensor) or val.dim() != 3 or val.shape[1] != length or user.args[0] is not tokens:
        return None
    if user.target is aten.select.int and user.args[1] == 1:
        start, stop = user.args[2], user.args[2] + 1  # type: ignore[operator]
    elif user.target is aten.slice.Tensor and user.args[1:2] == (1,) and user.meta["val"].shape[1] == 1:
        start, stop = user.args[2], None
    else:
        return None
    if start == 0:
        return "first"
    return "last" if start in (-1, length - 1) and stop in (None, start + 1) else None  # type: ignore[operator]
