"""A recurrent reader of images, one row per step: the reference for hidden states shared by four gates."""

from torch import Tensor, nn

_IMAGE_SIZE = 32
_HIDDEN = 96


class LSTMDigits(nn.Module):
    """Two-layer LSTM over the 32 rows of an image: (B, 1, 32, 32) float -> (B, classes) logits."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(_IMAGE_SIZE, _HIDDEN, num_layers=2, batch_first=True)
        self.classifier = nn.Linear(_HIDDEN, classes)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x.squeeze(1))
        return self.classifier(states[:, -1])
