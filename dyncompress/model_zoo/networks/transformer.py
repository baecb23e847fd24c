"""The block that the vision and the text transformer are made of, written out by hand.

Shape letters: B batch, N tokens, D model width, H heads, K head dim.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention with one fused q|k|v projection: (B, N, D) -> (B, N, D).

    mask: bool, broadcast to (B, H, N, N); False where nothing is looked at.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, _ = x_BND.shape
        split = (batch, tokens, self.heads, self.head_dim)
        q_BHNK, k_BHNK, v_BHNK = (part.view(split).transpose(1, 2) for part in self.qkv(x_BND).chunk(3, dim=-1))
        y_BHNK = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK, attn_mask=mask)
        return self.proj(y_BHNK.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))


class EncoderBlock(nn.Module):
    """Attention and MLP, each with its residual connection: (B, N, D) -> (B, N, D).

    norm_first normalises what the two read (pre-norm); without it, their sums with the shortcut (post-norm, as BERT).
    """

    def __init__(self, width: int, heads: int, hidden: int, norm_first: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x_BND: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.norm_first:
            x_BND = x_BND + self.dropout(self.attention(self.norm1(x_BND), mask))
            return x_BND + self.dropout(self.mlp(self.norm2(x_BND)))
        x_BND = self.norm1(x_BND + self.dropout(self.attention(x_BND, mask)))
        return self.norm2(x_BND + self.dropout(self.mlp(x_BND)))
