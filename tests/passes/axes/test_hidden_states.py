"""Hidden states of loops that capture unrolled: which axes they are, and that learned sparsity takes them out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_options import flat
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dyncompress as dc
from dyncompress.model_zoo import build


class Loop(nn.Module):
    """(B, 4, 5): `step` four times, with x_t = stem of the input at t."""

    def __init__(self, step: Callable[["Loop", Tensor, Tensor], Tensor], *, narrow: bool = False) -> None:
        super().__init__()
        self.stem, self.head, self.step = nn.Linear(5, 6), nn.Linear(6, 3), step
        self.mix = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6)) if narrow else nn.Linear(6, 6)
        self.matrix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        state = self.stem(x[:, 0])
        for t in range(1, 4):
            state = self.step(self, state, self.stem(x[:, t]))
        return self.head(state)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (Loop(lambda net, state, x: (net.mix(state) + x).tanh()), "hidden states"),
        (Loop(lambda net, state, x: (state @ net.matrix + x).tanh()), "hidden states"),
        (Loop(lambda net, state, x: state + net.mix(x)), "neurons"),  # called again, but never on its own result
        (Loop(lambda net, state, x: state + net.mix(state), narrow=True), "neurons"),  # depth with shared weights
    ],
)
def test_a_state_is_what_a_weight_reads_again(model: nn.Module, kind: str) -> None:
    axes = dc.infer_axes(dc.capture(model, torch.randn(2, 4, 5)))
    width = next(axis for axis in axes if any(s.tensor == "head.weight" and s.dim == 1 for s in axis.slices))
    assert width.kind == kind


def test_a_recurrent_highway_loses_hidden_states() -> None:
    torch.manual_seed(0)
    model = build("rhn-lm", vocabulary=7, width=6, hidden=12, depth=2)
    start = torch.arange(96)[:, None] + torch.arange(4)
    data = TensorDataset(start[:, :-1] % 7, start[:, 1:] % 7)
    options: dict[str, Any] = {"epochs": 10, "finetune": 2, "batch_size": 8, "lr": 2e-2, "device": "cpu"}
    small: Any = flat(dc.sparsify)(model, data, params=0.5, kinds=("hidden states",), **options)
    report = small.meta["info"]["sparsify"]
    hidden = len(report["kept"]["highway.input.weight:0.0"]["kept"])
    assert 1 < hidden < 12 and report["learned"] == report["left"] <= 0.5
    assert small.highway.input.weight.shape == (2 * hidden, 6)
    assert all(layer.weight.shape == (2 * hidden, hidden) for layer in small.highway.layers.children())
    assert small.decoder.weight.shape == (7, hidden) and small.embedding.weight.shape == (7, 6)
    assert (small.eval()(data.tensors[0]).argmax(-1) == data.tensors[1]).double().mean() > 0.8
