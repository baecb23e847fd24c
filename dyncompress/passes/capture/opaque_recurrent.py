"""Recurrent layers stay whole during capture.

torch.export unrolls an ``nn.LSTM`` over time and so fixes its length. While a model is captured its LSTM, GRU and RNN
layers call the opaque operator ``dyncompress::recurrent`` instead, which `lift` turns back into the layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RequestError


@torch.library.custom_op("dyncompress::recurrent", mutates_args=())
def recurrent(
    x: Tensor, hx: list[Tensor], weights: list[Tensor], hidden: int, out: int, layers: int, dirs: int,
    batch_first: bool, has_cell: bool,
) -> list[Tensor]:  # fmt: skip
    """Placeholder for a recurrent layer's call; it has a shape but no arithmetic.

    Raises:
        NotImplementedError: always, when run on real tensors; `lift` replaces it before anything runs.
    """
    raise NotImplementedError("a recurrent layer was captured but not lifted back to its module")


@recurrent.register_fake
def _(
    x: Tensor, hx: list[Tensor], weights: list[Tensor], hidden: int, out: int, layers: int, dirs: int,
    batch_first: bool, has_cell: bool,
) -> list[Tensor]:  # fmt: skip
    batch = x.shape[0] if batch_first else x.shape[1]
    y = x.new_empty((*x.shape[:2], dirs * out))
    h = x.new_empty((layers * dirs, batch, out))
    return [y, h, x.new_empty((layers * dirs, batch, hidden))] if has_cell else [y, h]


def _opaque_forward(self: nn.RNNBase, input: Tensor, hx: Any = None) -> Any:
    if not isinstance(input, Tensor) or input.dim() != 3:
        raise RequestError(
            f"{type(self).__name__} was called with an unbatched or packed sequence; call it with a padded (batch, "
            "time, features) tensor"
        )
    cell = isinstance(self, nn.LSTM)
    states = [] if hx is None else list(hx) if cell else [hx]
    weights = [getattr(self, name) for name in self._flat_weights_names]
    out = self.proj_size or self.hidden_size
    dirs = 2 if self.bidirectional else 1
    y, *state = recurrent(input, states, weights, self.hidden_size, out, self.num_layers, dirs, self.batch_first, cell)
    return y, (tuple(state) if cell else state[0])


@contextmanager
def opaque_recurrent_layers() -> Iterator[None]:
    """While active, every LSTM, GRU and RNN layer records one opaque call instead of its arithmetic."""
    kinds: tuple[Any, ...] = (nn.LSTM, nn.GRU, nn.RNN)
    saved = [kind.forward for kind in kinds]
    try:
        for kind in kinds:
            kind.forward = _opaque_forward
        yield
    finally:
        for kind, forward in zip(kinds, saved, strict=True):
            kind.forward = forward
