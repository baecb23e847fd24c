"""A reader that finds the answer to a question in a text: the reference for two inputs and attention between LSTMs.

Shape letters: B batch, T tokens of the context, J tokens of the question, D word width, H hidden states of a direction.
"""

import torch
from torch import Tensor, nn


class Highway(nn.Module):
    """x + gate * (relu(W x) - x) (Srivastava et al. 2015): (..., D) -> (..., D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(x).sigmoid() * (self.transform(x).relu() - x)


class AttentionFlow(nn.Module):
    """Attention in both directions (Seo et al. 2017, section 2, layer 4): (B, T, E), (B, J, E) -> (B, T, 4 E).

    The similarity w [h; u; h * u] of every pair is computed as three products, without the (B, T, J, 3 E) tensor.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_context = nn.Linear(width, 1)
        self.of_question = nn.Linear(width, 1, bias=False)
        self.of_both = nn.Parameter(torch.randn(width) / width**0.5)

    def forward(self, h_BTE: Tensor, u_BJE: Tensor, context_padding: Tensor, question_padding: Tensor) -> Tensor:
        similarity_BTJ = (h_BTE * self.of_both) @ u_BJE.transpose(1, 2)
        similarity_BTJ = similarity_BTJ + self.of_context(h_BTE) + self.of_question(u_BJE).transpose(1, 2)
        similarity_BTJ = _hide(similarity_BTJ, question_padding[:, None])
        to_question_BTE = similarity_BTJ.softmax(-1) @ u_BJE
        weights_BT = _hide(similarity_BTJ.amax(-1), context_padding).softmax(-1)
        to_context_B1E = weights_BT[:, None] @ h_BTE
        return torch.cat((h_BTE, to_question_BTE, h_BTE * to_question_BTE, h_BTE * to_context_B1E), dim=-1)


class BiDAF(nn.Module):
    """Bidirectional attention flow (Seo et al. 2017) on words alone, without the paper's characters.

    (context (B, T) int64, question (B, J) int64) -> (B, 2, T) logits: where the answer starts, and where it ends.
    Id 0 is padding, where no answer can be.
    """

    def __init__(self, vocabulary: int = 10_000, width: int = 100, hidden: int = 100, dropout: float = 0.2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.highway = nn.Sequential(Highway(width), Highway(width))
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.attention = AttentionFlow(2 * hidden)
        self.model = nn.LSTM(8 * hidden, hidden, 2, batch_first=True, bidirectional=True, dropout=dropout)
        self.ending = nn.LSTM(2 * hidden, hidden, batch_first=True, bidirectional=True)
        self.start = nn.Linear(10 * hidden, 1)
        self.end = nn.Linear(10 * hidden, 1)

    def forward(self, context: Tensor, question: Tensor) -> Tensor:
        flow = self.attention(self._encoded(context), self._encoded(question), context == 0, question == 0)
        model, _ = self.model(self.dropout(flow))
        ending, _ = self.ending(self.dropout(model))
        start = self.start(self.dropout(torch.cat((flow, model), dim=-1)))
        end = self.end(self.dropout(torch.cat((flow, ending), dim=-1)))
        logits_B2T = torch.cat((start, end), dim=-1).transpose(1, 2)
        return _hide(logits_B2T, (context == 0)[:, None])

    def _encoded(self, ids: Tensor) -> Tensor:
        states, _ = self.encoder(self.dropout(self.highway(self.embedding(ids))))
        return states


def _hide(scores: Tensor, padding: Tensor) -> Tensor:
    """Scores so low at padding that a softmax gives nothing to it."""
    return scores.masked_fill(padding, -1e4)
