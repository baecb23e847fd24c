"""Two small classics, the trunks of BranchyNet (Teerapittayanon et al. 2016): LeNet-5 and an AlexNet for 32x32 images.

Their branches need no code here: exits can be inserted after any layer.
"""

from torch import Tensor, nn


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al. 1998) as it is built today, with ReLU and max pooling.

    (B, channels, size, size) float -> (B, classes) logits; the first convolution pads 28x28 images to 32x32.
    """

    def __init__(self, classes: int = 10, channels: int = 1, size: int = 28) -> None:
        super().__init__()
        padding = (32 - size) // 2
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=padding)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()
        side = ((size + 2 * padding - 4) // 2 - 4) // 2
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.classifier = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = self.relu(self.fc1(x.flatten(1)))
        return self.classifier(self.relu(self.fc2(x)))


def _conv(channels_in: int, channels_out: int, kernel: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]


class AlexNet(nn.Module):
    """AlexNet's layout (Krizhevsky et al. 2012) for small images: five convolutions, overlapping pooling, three layers.

    (B, channels, 32, 32) float -> (B, classes) logits. Batch norm takes the place of local response normalisation.
    """

    def __init__(
        self,
        classes: int = 10,
        channels: int = 3,
        widths: tuple[int, int, int, int, int] = (32, 64, 96, 96, 64),
        hidden: tuple[int, int] = (256, 128),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.features = nn.Sequential(
            *_conv(channels, a, 5),
            nn.MaxPool2d(3, stride=2, padding=1),
            *_conv(a, b, 5),
            nn.MaxPool2d(3, stride=2, padding=1),
            *_conv(b, c, 3),
            *_conv(c, d, 3),
            *_conv(d, e, 3),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.classifier = nn.Sequential(
            nn.Linear(e * 4 * 4, hidden[0]),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden[1], classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))
