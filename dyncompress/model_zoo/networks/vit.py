"""A small vision transformer: the reference for heads, head dims and pre-norm residual blocks.

Shape letters: B batch, N tokens (64 patches + the class token), D model width.
"""

import torch
from torch import Tensor, nn

from .transformer import EncoderBlock

_IMAGE_SIZE = 32
_PATCH = 4
_WIDTH = 96
_DEPTH = 6
_HEADS = 4
_HIDDEN = 192


class ViTDigits(nn.Module):
    """Vision transformer with 4x4 patches and a class token: (B, 1, 32, 32) float -> (B, classes) logits."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        tokens = (_IMAGE_SIZE // _PATCH) ** 2 + 1
        self.patch_embed = nn.Conv2d(1, _WIDTH, _PATCH, stride=_PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, _WIDTH))
        self.position = nn.Parameter(torch.randn(1, tokens, _WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(_WIDTH, _HEADS, _HIDDEN) for _ in range(_DEPTH)))
        self.norm = nn.LayerNorm(_WIDTH)
        self.classifier = nn.Linear(_WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches_BND = self.patch_embed(x).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(x.shape[0], -1, -1)
        x_BND = torch.cat((class_token, patches_BND), dim=1) + self.position
        x_BND = self.norm(self.blocks(x_BND))
        return self.classifier(x_BND[:, 0])
