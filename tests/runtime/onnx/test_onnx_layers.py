"""Static models in ONNX files: recurrent layers, attention of every form, and operators that have none."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from cases import CASES, graph
from onnx_files import run
from torch import Tensor, nn

from dyncompress.errors import DynCompressError
from dyncompress.passes.capture.capture import capture
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.passes.graph.random_inputs import random_inputs
from dyncompress.passes.modules.ragged_recurrent import RaggedRecurrent
from dyncompress.runtime.onnx.export import export_onnx
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import ExitPolicy


def test_a_static_model_gives_its_own_outputs(tmp_path: Path) -> None:
    report = export_onnx(graph("text"), tmp_path / "text.onnx")
    torch.manual_seed(0)
    batch = CASES["text"].batch(6)
    got, wanted = run(tmp_path / "text.onnx", batch), graph("text")(**batch)
    assert set(got) == set(report.outputs) == {"features", "logits"}
    assert report.exits == []
    for key, value in got.items():
        np.testing.assert_allclose(value, wanted[key].detach().numpy(), rtol=1e-4, atol=1e-5)


def ragged(mode: str, sizes: list[int], proj: list[int], bidirectional: bool) -> RaggedRecurrent:
    return RaggedRecurrent(mode, 6, sizes, proj, True, True, 0.0, bidirectional)


class Recurrent(nn.Module):
    """Every recurrent layer there is, with states given and read."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)
        self.gru, self.rnn = nn.GRU(6, 5, bias=False, bidirectional=True), nn.RNN(6, 5, nonlinearity="relu")
        self.projected = nn.LSTM(6, 7, 2, batch_first=True, proj_size=3, bidirectional=True)
        self.tanh, self.ragged = nn.RNN(6, 5, batch_first=True), nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        start = torch.ones(4, x.shape[0], 5) * 0.3
        y, (h, c) = self.lstm(x, (start, -start))
        found = [y[:, -1], h[-1], c[0]]
        y, h = self.gru(x.transpose(0, 1), start[:2])
        found += [y[0], h[1], self.rnn(x.transpose(0, 1))[0][-1]]
        y, (h, c) = self.projected(x)
        found += [y[:, 2], h[1], c[2], self.tanh(x)[0][:, -1], self.ragged(x)[0][:, 1]]
        return torch.cat(found, 1)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_recurrent_layers_of_every_kind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = capture(Recurrent(), torch.randn(2, 4, 6)).eval()
    made.set_submodule("ragged", ragged("LSTM", [4, 3, 5, 2], [], True))
    export_onnx(made, tmp_path / "r.onnx")
    x = torch.randn(9, 4, 6)
    got = run(tmp_path / "r.onnx", x)["logits"]
    np.testing.assert_allclose(got, made(x).detach().numpy(), rtol=1e-4, atol=1e-5)


class Unknown(nn.Module):
    """An operator that has no ONNX form, deep inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wave, self.last = nn.Linear(8, 8), nn.Sequential(nn.Identity(), Wave()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wave(self.first(x)))


class Wave(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_an_operator_without_an_onnx_form_is_named(tmp_path: Path) -> None:
    made = InsertExits(1)(capture(Unknown(), torch.randn(2, 8))).gm
    model = DynamicModel(made, ExitPolicy("max-softmax", (0.5,)))
    with pytest.raises(
        DynCompressError, match=r"cannot translate aten\.special_bessel_j0\.default, called in 'wave\.1'"
    ):
        export_onnx(model, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_random_inputs_look_real() -> None:
    ids, mask = random_inputs(graph("text"), 50)
    assert ids.shape == mask.shape == (50, 7)
    assert ids.dtype == torch.int64 and ids.min() == 0 and 40 < ids.max() < 50
    lengths = mask.sum(1)
    assert lengths.min() >= 1 and len(lengths.unique()) > 3
    assert torch.equal(mask, (torch.arange(7) < lengths[:, None]).long())
    assert random_inputs(graph("text"), 2, shorter=True)[0].shape == (2, 6)
    again, (x,) = random_inputs(graph("resnet"), 9), random_inputs(graph("resnet"), 9)
    assert torch.equal(again[0], x) and x.shape == (9, 3, 16, 16)
    assert x.flatten(1).std(1).max() > 3 * x.flatten(1).std(1).min()


class Decoder(nn.Module):
    """Tokens of any length attend to themselves and to a memory of another length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(30, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:
        x = self.embed(ids).unflatten(-1, (2, 4)).transpose(1, 2)
        m = memory.unflatten(-1, (2, 4)).transpose(1, 2)
        x = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        x = nn.functional.scaled_dot_product_attention(x, m, m)
        return self.out(x.transpose(1, 2).flatten(2))


def test_two_unknown_sizes_are_not_taken_for_equal_ones(tmp_path: Path) -> None:
    gm = capture(Decoder().eval(), (torch.randint(0, 30, (2, 7)), torch.randn(2, 11, 8)))
    export_onnx(gm, tmp_path / "decoder.onnx")
    values = onnx.load(tmp_path / "decoder.onnx").graph.value_info
    assert all(d.dim_param != "None" for v in values for d in v.type.tensor_type.shape.dim)


class Windows(nn.Module):
    """Attention inside windows: (batch, windows, heads, tokens, width), and without a batch of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, 4)).unflatten(-1, (3, 2, 4)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        mask = torch.zeros(3, 1, 4, 4).masked_fill(torch.arange(4) == 3, -torch.inf)
        x = nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.out(nn.functional.scaled_dot_product_attention(x, x, x))


def test_attention_of_any_rank(tmp_path: Path) -> None:
    gm = capture(Windows().eval(), torch.randn(2, 12, 8))
    assert max(export_onnx(gm, tmp_path / "windows.onnx").max_error.values()) < 1e-4
