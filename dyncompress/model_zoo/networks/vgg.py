"""A plain stack of 3x3 convolutions: the reference for a network that is one straight line."""

from torch import Tensor, nn

# "pool" halves both sides. The early stages are narrow, so that an exit after the first pooling costs a fifth.
_LAYOUT: tuple[int | str, ...] = (48, 48, "pool", 96, 96, "pool", 192, 192, 192, "pool", 192)


def _conv_bn_relu(channels_in: int, channels_out: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU())


class VGG(nn.Module):
    """VGG-style classifier, 112 M MACs an image: (B, channels, 32, 32) float -> (B, classes) logits."""

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in _LAYOUT:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(_conv_bn_relu(channels, width))
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))
