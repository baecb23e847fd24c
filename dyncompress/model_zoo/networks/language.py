"""Language models: token ids (B, T) int64 -> logits (B, T, vocabulary) of the next token."""

import torch
from torch import Tensor, nn

from ...errors import RequestError


class LSTMLanguageModel(nn.Module):
    """Embedding, stacked LSTM, decoder (Zaremba et al. 2014); tied shares the embedding with the decoder (Press & Wolf
    2017), for which width and hidden must agree.

    Raises RequestError for tied weights of different widths.
    """

    def __init__(
        self,
        vocabulary: int = 10_000,
        width: int = 200,
        hidden: int = 200,
        layers: int = 2,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        if tied and width != hidden:
            raise RequestError(f"tied weights need width ({width}) and hidden ({hidden}) to agree")
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.decoder = nn.Linear(hidden, vocabulary)
        _start_small(self, 0.1)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        states_BTH, _ = self.lstm(self.dropout(self.embedding(ids_BT)))
        return self.decoder(self.dropout(states_BTH))


class RecurrentHighway(nn.Module):
    """A recurrent highway layer with coupled gates (Zilly et al. 2017, eqs. 6 to 9): (B, T, width) -> (B, T, hidden).

    One step takes the state s through `depth` highway layers, of which the first also reads the input x:

        h, t = tanh(W_h x + R_h s + b_h), sigmoid(W_t x + R_t s + b_t);  s <- s + t * (h - s)

    R_h and R_t are one matrix (2 * hidden, hidden). The loop over time is plain Python: a captured model repeats its
    7 * depth operators for each of the T steps of the example, and takes sequences of just that length.
    """

    def __init__(self, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.input = nn.Linear(width, 2 * hidden, bias=False)
        layers = [nn.Linear(hidden, 2 * hidden) for _ in range(depth)]
        for layer in layers:
            nn.init.constant_(layer.bias[hidden:], -2.0)  # gates start nearly closed, so that the state is carried
        self.layers = nn.ModuleList(layers)

    def forward(self, x_BTD: Tensor) -> Tensor:
        steps = self.input(x_BTD).unbind(1)
        state_BH = x_BTD.new_zeros(x_BTD.shape[0], self.hidden)
        states = []
        for step in steps:
            for index, layer in enumerate(self.layers):
                both = layer(state_BH) + step if index == 0 else layer(state_BH)
                proposal, gate = both.chunk(2, dim=-1)
                state_BH = state_BH.lerp(proposal.tanh(), gate.sigmoid())
            states.append(state_BH)
        return torch.stack(states, dim=1)


class RHNLanguageModel(nn.Module):
    """Embedding, one recurrent highway layer, decoder (Zilly et al. 2017), with plain dropout around the layer.

    Captured, it takes sequences of the example's length only (see RecurrentHighway).
    """

    def __init__(
        self, vocabulary: int = 10_000, width: int = 200, hidden: int = 200, depth: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.highway = RecurrentHighway(width, hidden, depth)
        self.decoder = nn.Linear(hidden, vocabulary)
        _start_small(self, 0.1)

    def forward(self, ids_BT: Tensor) -> Tensor:
        states_BTH = self.highway(self.dropout(self.embedding(ids_BT)))
        return self.decoder(self.dropout(states_BTH))


def _start_small(model: LSTMLanguageModel | RHNLanguageModel, bound: float) -> None:
    """Embedding and decoder uniform in -bound..bound: the default's unit variance saturates a tied decoder."""
    nn.init.uniform_(model.embedding.weight, -bound, bound)
    nn.init.uniform_(model.decoder.weight, -bound, bound)
    nn.init.zeros_(model.decoder.bias)
