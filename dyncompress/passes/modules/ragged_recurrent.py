"""A recurrent stack whose layers and directions may differ in width: what an LSTM, GRU or RNN shrinks to.

nn.LSTM wants one hidden size for all its layers; learned structure does not (a 2x1500 LSTM became 373 and 315 wide in
Wen et al., Learning Intrinsic Sparse Structures within LSTM, 2018). Parameter names are those of nn.LSTM.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CELLS = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}


class RaggedRecurrent(nn.Module):
    """Same call and result as nn.LSTM / nn.GRU / nn.RNN; the width of each layer and direction is its weights' own.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        input_size: features per step.
        hidden_sizes: one per layer and direction, forward before backward.
        proj_sizes: likewise, for an LSTM with projections; empty otherwise.

    A state can be passed or read only when all widths agree; otherwise the state returned is None.
    """

    def __init__(
        self, mode: str, input_size: int, hidden_sizes: list[int], proj_sizes: list[int], bias: bool, batch_first: bool,
        dropout: float, bidirectional: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.mode, self.input_size = mode, input_size
        self.hidden_sizes, self.proj_sizes = list(hidden_sizes), list(proj_sizes)
        self.bias, self.batch_first, self.dropout, self.bidirectional = (
            bias,
            batch_first,
            dropout,
            bidirectional,
        )
        self.directions = 2 if bidirectional else 1
        self.num_layers, self.proj_size = len(hidden_sizes) // self.directions, bool(proj_sizes)
        gates = {"LSTM": 4, "GRU": 3}.get(mode, 1)
        outs, feed = self.proj_sizes or self.hidden_sizes, input_size
        for at, hidden in enumerate(self.hidden_sizes):
            layer, direction = divmod(at, self.directions)
            suffix = self._suffix(layer, direction)
            if layer and not direction:
                feed = sum(outs[at - self.directions : at])
            self._new(f"weight_ih{suffix}", gates * hidden, feed)
            self._new(f"weight_hh{suffix}", gates * hidden, outs[at])
            if bias:
                self._new(f"bias_ih{suffix}", gates * hidden)
                self._new(f"bias_hh{suffix}", gates * hidden)
            if proj_sizes:
                self._new(f"weight_hr{suffix}", self.proj_sizes[at], hidden)

    def _new(self, name: str, *shape: int) -> None:
        bound = self.hidden_sizes[0] ** -0.5
        self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))

    @staticmethod
    def _suffix(layer: int, direction: int) -> str:
        return f"_l{layer}" + ("_reverse" if direction else "")

    def spec(self) -> dict[str, Any]:
        """Constructor arguments as plain JSON."""
        names = (
            "mode",
            "input_size",
            "hidden_sizes",
            "proj_sizes",
            "bias",
            "batch_first",
            "dropout",
            "bidirectional",
        )
        return {"type": "RaggedRecurrent", "args": {n: getattr(self, n) for n in names}}

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        """x: (batch, time, features), or (time, batch, features) without batch_first."""
        x = x if self.batch_first else x.transpose(0, 1)
        states = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(self.directions):
                y, state = self._run(x, layer, direction, hx)
                outputs.append(y)
                states.append(state)
            x = torch.cat(outputs, -1)
            if self.dropout and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        return (x if self.batch_first else x.transpose(0, 1)), self._stacked(states)

    def _run(self, x: Tensor, layer: int, direction: int, hx: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        suffix = self._suffix(layer, direction)
        kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
        weights = [getattr(self, kind + suffix) for kind in (*kinds, *(["weight_hr"] if self.proj_size else []))]
        state = self._initial(x, layer * self.directions + direction, hx)
        x = x.flip(1) if direction else x
        if self.proj_size and weights[-1].shape[0] == weights[-1].shape[1]:
            return self._run_padded(x, weights, state, bool(direction))
        given = state if self.mode == "LSTM" else state[0]
        y, *last = _CELLS[self.mode](x, given, weights, self.bias, 1, 0.0, False, False, True)  # type: ignore[operator]
        return (y.flip(1) if direction else y), tuple(last)

    def _run_padded(
        self, x: Tensor, weights: list[Tensor], state: tuple[Tensor, ...], backward: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """ATen tells a projection by its width differing from the cell's: one cell of zeros makes it differ."""
        padded = [F.pad(w.unflatten(0, (4, -1)), (*[0, 0] * (w.dim() - 1), 0, 1)).flatten(0, 1) for w in weights[:-1]]
        hx = (state[0], F.pad(state[1], (0, 1)))
        y, h, c = torch.lstm(x, hx, [*padded, F.pad(weights[-1], (0, 1))], self.bias, 1, 0.0, False, False, True)
        return (y.flip(1) if backward else y), (h, c[..., :-1])

    def _initial(self, x: Tensor, at: int, hx: Any) -> tuple[Tensor, ...]:
        if hx is not None:
            given = hx if self.mode == "LSTM" else (hx,)
            return tuple(state[at : at + 1].contiguous() for state in given)
        widths = [(self.proj_sizes or self.hidden_sizes)[at], self.hidden_sizes[at]]
        count = 2 if self.mode == "LSTM" else 1
        return tuple(x.new_zeros(1, x.shape[0], width) for width in widths[:count])

    def _stacked(self, states: list[tuple[Tensor, ...]]) -> Any:
        if len(set(self.hidden_sizes)) > 1 or len(set(self.proj_sizes)) > 1:
            return None
        stacked = tuple(torch.cat(parts) for parts in zip(*states, strict=True))
        return stacked if self.mode == "LSTM" else stacked[0]

    def extra_repr(self) -> str:
        """The cell and its widths."""
        return f"{self.mode}, {self.input_size}, hidden_sizes={self.hidden_sizes}"
