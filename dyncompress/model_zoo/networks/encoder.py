"""A text classifier in the manner of BERT: the reference for heads, MLP neurons and padding masks.

Shape letters: B batch, T tokens, D model width.
"""

import torch
from torch import Tensor, nn

from ...errors import RequestError
from .transformer import EncoderBlock


class TextEncoder(nn.Module):
    """Transformer encoder over words (Devlin et al. 2019): (B, T) int64 token ids, 0 = padding -> (B, classes) logits.

    The answer is read from the first token, so that every text should start with the same one, as `text:` data does.
    T may be up to `positions`, and nothing looks at padding. norm_first chooses pre-norm blocks with a last norm; the
    default is BERT's post-norm, which normalises the embeddings instead.

    Raises RequestError when the width cannot be divided among the heads.
    """

    def __init__(
        self,
        vocabulary: int = 30_000,
        classes: int = 2,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        hidden: int = 512,
        positions: int = 256,
        norm_first: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width % heads:
            raise RequestError(f"a width of {width} cannot be divided among {heads} heads: choose a multiple")
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.position = nn.Parameter(torch.zeros(1, positions, width))
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)
        self.embedding.weight.data[0] = 0
        self.first_norm = nn.Identity() if norm_first else nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, hidden, norm_first, dropout) for _ in range(depth))
        self.last_norm = nn.LayerNorm(width) if norm_first else nn.Identity()
        self.classifier = nn.Linear(width, classes)

    def forward(self, ids_BT: Tensor) -> Tensor:
        mask_B11T = (ids_BT != 0)[:, None, None]
        x_BTD = self.embedding(ids_BT) + self.position[:, : ids_BT.shape[1]]
        x_BTD = self.dropout(self.first_norm(x_BTD))
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_B11T)
        return self.classifier(self.last_norm(x_BTD)[:, 0])
