"""Heads that are more than one layer: plain modules, which `insert_head` writes into a graph operator by operator.

So they are typed, counted, shrunk, saved and exported like the rest of the model, and need no form of their own.
"""

import torch
from torch import Tensor, nn

_REDUCTION = 4  # of the channels inside a bottleneck, as in a ResNet's


def channel_means(x: Tensor, channel_dim: int) -> Tensor:
    """The mean over all dims but the batch and the channels: (batch, channels)."""
    others = [d for d in range(1, x.dim()) if d != channel_dim]
    return x.mean(others) if others else x


class LinearHead(nn.Module):
    """The mean over all dims but the batch and the channels, then one linear layer."""

    def __init__(self, features: int, classes: int, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ..., features, ...) to (batch, classes) logits."""
        return self.linear(channel_means(x, self.channel_dim))


class AttentionHead(nn.Module):
    """SCAN's head (Zhang et al., NeurIPS 2019): the map times an attention map of its own, a bottleneck, linear.

    Attention: conv 3x3 stride 2, BatchNorm, ReLU, transposed conv 4 stride 2, BatchNorm, sigmoid. Bottleneck: conv 1x1
    to a quarter of the channels, conv 3x3 stride 2, conv 1x1 back, each with BatchNorm and ReLU; then the mean.
    """

    def __init__(self, channels: int, classes: int, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.down = nn.Conv2d(channels, channels, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.up = nn.ConvTranspose2d(channels, channels, 4, 2, 1, bias=False)
        self.gate_norm = nn.BatchNorm2d(channels)
        inner = max(1, channels // _REDUCTION)
        self.bottleneck = nn.Sequential(
            *_conv(channels, inner, 1), *_conv(inner, inner, 3, stride=2), *_conv(inner, channels, 1)
        )
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width), or channels last, to (batch, classes) logits."""
        if self.channel_dim == 3:
            x = x.permute(0, 3, 1, 2)
        gate = self.gate_norm(self.up(torch.relu(self.norm(self.down(x)))))
        gate = gate[:, :, : x.shape[2], : x.shape[3]]  # an odd side comes back one too long
        return self.linear(self.bottleneck(x * torch.sigmoid(gate)).mean((2, 3)))


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]


class MLPHead(nn.Module):
    """LayerNorm, a hidden layer as wide as the features with GELU, linear; `token` None reads a plain vector."""

    def __init__(self, features: int, classes: int, token: str | None = None) -> None:
        super().__init__()
        self.token = token
        self.norm = nn.LayerNorm(features)
        self.hidden = nn.Linear(features, features)
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, features), or (batch, features), to (batch, classes) logits."""
        if self.token is not None:
            x = x[:, 0] if self.token == "first" else x[:, -1] if self.token == "last" else x.mean(1)
        return self.linear(nn.functional.gelu(self.hidden(self.norm(x))))


class PositionHead(nn.Module):
    """LayerNorm and a linear layer at every position, for sequence labelling and language models."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, features) to (batch, time, classes) logits."""
        return self.linear(self.norm(x))


# --- ZTW: no earlier answer is thrown away (Wolczyk et al., NeurIPS 2021, equations 1 to 3) ------------------------


class Cascade(nn.Module):
    """Adds what the exit before answered to an exit's logits, and its log-probabilities to the list of all so far.

    The head of the paper reads [features, probabilities before]; a linear layer on both is the sum of one on each. What
    came before is detached: an exit does not train the earlier ones.
    """

    def __init__(self, classes: int, first: bool) -> None:
        super().__init__()
        self.linear = None if first else nn.Linear(classes, classes, bias=False)

    def forward(self, z: Tensor, before: Tensor | None = None) -> Tensor:
        """Logits (batch, classes) and (batch, k, classes) log-probabilities to (batch, k + 1, classes)."""
        if self.linear is None or before is None:
            return torch.log_softmax(z, -1).unsqueeze(1)
        z = z + self.linear(before[:, -1].detach().exp())
        return torch.cat((before.detach(), torch.log_softmax(z, -1).unsqueeze(1)), 1)


class Ensemble(nn.Module):
    """The weighted geometric mean of the answers so far: the logits are sum_j w_j log p_j + b with w_j >= 0.

    It begins as the last of them alone.
    """

    def __init__(self, exits: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(exits)[-1].clone().unsqueeze(1))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, log_p: Tensor) -> Tensor:
        """(batch, exits, classes) log-probabilities to (batch, classes) logits."""
        return (torch.relu(self.weight) * log_p).sum(1) + self.bias
