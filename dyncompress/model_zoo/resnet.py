"""A CIFAR-style residual network: the reference for blocks that can be skipped or removed whole."""

from torch import Tensor, nn

_WIDTHS = (24, 48, 96)
_BLOCKS_PER_STAGE = 3


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, C_in, H, W) -> (B, C_out, H/stride, W/stride)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            projection = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return self.relu(branch + self.shortcut(x))


def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    blocks = [BasicBlock(channels_in, channels_out, stride)]
    blocks += [BasicBlock(channels_out, channels_out, 1) for _ in range(_BLOCKS_PER_STAGE - 1)]
    return nn.Sequential(*blocks)


class ResNetDigits(nn.Module):
    """ResNet-20 layout, 1.5 times as wide: (B, 1, 32, 32) float -> (B, classes) logits."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(_WIDTHS[0])
        self.relu = nn.ReLU()
        self.stage1 = _stage(_WIDTHS[0], _WIDTHS[0], stride=1)
        self.stage2 = _stage(_WIDTHS[0], _WIDTHS[1], stride=2)
        self.stage3 = _stage(_WIDTHS[1], _WIDTHS[2], stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(_WIDTHS[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.classifier(self.pool(x).flatten(1))
