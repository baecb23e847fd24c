"""Attention: whole heads become zero and leave; a layer whose attention is dead goes whole; the picture shows which."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_options import flat
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dyncompress as dc
from dyncompress.cli.report.plots import plot_kept
from dyncompress.compress.sparsity.sparsify_report import SparsifyReport
from dyncompress.model_zoo.networks.encoder import TextEncoder
from dyncompress.model_zoo.networks.transformer import EncoderBlock

WIDTH, HEADS, DEPTH = 16, 4, 2


class Vision(nn.Module):
    """Images (B, 1, 8, 8) as four patches and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(1, WIDTH, 4, 4), nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, 5, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(WIDTH, HEADS, 24) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.token.expand(len(x), -1, -1), tokens), 1) + self.position
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def text(norm_first: bool) -> nn.Module:
    return TextEncoder(12, 2, WIDTH, DEPTH, HEADS, 24, positions=8, norm_first=norm_first, dropout=0.0)


def data_of(model: nn.Module, count: int = 256) -> TensorDataset:
    """Which of two words comes more often; rows or columns."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, Vision):
        x, y = torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 2
        x[y == 0, :, ::2] += 1
        x[y == 1, :, :, ::2] += 1
        return TensorDataset(x, y)
    words = torch.randint(3, 12, (count, 8), generator=generator)
    words[:, 0] = 2
    return TensorDataset(words, ((words == 3).sum(1) > (words == 4).sum(1)).long())


MODELS = pytest.mark.parametrize(
    "make", [lambda: text(True), lambda: text(False), Vision], ids=["pre-norm text", "post-norm text", "vision"]
)
OPTIONS: dict[str, Any] = {"finetune": 2, "batch_size": 32, "lr": 1e-2, "floor": 0.0, "device": "cpu"}


def sparsified(make: Callable[[], nn.Module], **change: Any) -> tuple[dict[str, Tensor], SparsifyReport]:
    """The parameters of the smaller model, and the report; all of it was learned, and it still answers."""
    torch.manual_seed(0)
    model = make()
    data = data_of(model)
    small = flat(dc.sparsify)(model, data, **OPTIONS | change)
    x, y = data.tensors
    assert (small.eval()(x).argmax(1) == y).double().mean() > 0.9
    report = SparsifyReport.of(small)
    assert report.learned == report.left <= (change.get("params") or change["macs"])
    return dict(small.named_parameters()), report


@MODELS
def test_whole_heads_leave(make: Callable[[], nn.Module]) -> None:
    small, report = sparsified(make, params=0.8, kinds=("heads",), epochs=5)
    heads = [len(axis.kept) for axis in report.kept.values() if axis.kind == "heads"]
    assert len(heads) == DEPTH and sum(heads) < HEADS * DEPTH
    for layer, count in enumerate(heads):
        inside = count * WIDTH // HEADS
        assert small[f"blocks.{layer}.attention.qkv.weight"].shape == (3 * inside, WIDTH)
        assert small[f"blocks.{layer}.attention.proj.weight"].shape == (WIDTH, inside)
        assert small[f"blocks.{layer}.mlp.0.weight"].shape == (24, WIDTH)


@MODELS
def test_dead_attention_goes_whole(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    macs = {"pre-norm text": 0.5}.get(request.node.callspec.id, 0.6)  # there the MLP branches change less, and go first
    small, report = sparsified(make, macs=macs, kinds=("heads", "layers"), epochs=8)
    kept = report.kept
    gone = [at for at in range(DEPTH) if not any(name.startswith(f"blocks.{at}.attention.") for name in small)]
    assert 0 < len(gone) < DEPTH
    assert [kept[f"blocks.{at}.attention.qkv.weight:0.0"].kept for at in gone] == [()] * len(gone)

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self))
    plot_kept(Path("kept.png"), kept)
    axes = drawn[0].axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    picture = axes.images[0].get_array()
    for layer in range(DEPTH):
        name = f"blocks.{layer}.attention.qkv.weight:0.0"
        row = picture[next(i for i, label in enumerate(labels) if label.startswith(f"{name}  heads "))]
        dark = [at for at in range(HEADS) if (row.reshape(HEADS, -1)[at] == 1).all()]
        assert dark == list(kept[name].kept) and row.mean() == len(dark) / HEADS
