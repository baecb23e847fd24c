"""A small vision transformer written out by hand: the reference for heads, head dims and pre-norm residual blocks.

Shape letters: B batch, N tokens (64 patches + the class token), D model width, H heads, K head dim.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_IMAGE_SIZE = 32
_PATCH = 4
_WIDTH = 96
_DEPTH = 6
_HEADS = 4
_HIDDEN = 192


class Attention(nn.Module):
    """Multi-head self-attention with one fused q|k|v projection: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        batch, tokens, _ = x_BND.shape
        split = (batch, tokens, self.heads, self.head_dim)
        q_BHNK, k_BHNK, v_BHNK = (part.view(split).transpose(1, 2) for part in self.qkv(x_BND).chunk(3, dim=-1))
        y_BHNK = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)
        return self.proj(y_BHNK.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP, each with its residual connection: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attention(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


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
