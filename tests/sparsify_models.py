"""Small models, data and settings that the tests of learned sparsity share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dyncompress.model_zoo.load_data import ArrayDataset, Splits


class Net(nn.Module):
    """Images (B, 1, 8, 8) in 3 classes: residual branches on one width."""

    def __init__(self, branches: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(12, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU(),
                nn.Conv2d(10, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12),
            )
            for _ in range(branches)
        )  # fmt: skip
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class Words(nn.Module):
    """Next tokens (B, T, 11): an embedding, an LSTM and a LayerNorm, whose count is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(11, 8), nn.LSTM(8, 12, batch_first=True)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.lstm(self.embed(x))[0]))


def images(count: int = 192) -> TensorDataset:
    """Stripes along rows, along columns, or neither, in noise."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    stripes = (torch.arange(8) % 2).float()
    patterns = torch.stack([stripes[:, None].expand(8, 8), stripes.expand(8, 8), torch.full((8, 8), 0.5)])
    return TensorDataset(patterns[y][:, None] + 0.2 * torch.randn(count, 1, 8, 8, generator=generator), y)


def sentences(count: int = 320) -> TensorDataset:
    """Counting modulo 11 from anywhere, labelled with the next number at every position."""
    start = torch.arange(count)[:, None] + torch.arange(10)
    return TensorDataset(start[:, :-1] % 11, start[:, 1:] % 11)


def network(kind: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind()


OPTIONS: dict[str, Any] = {"epochs": 3, "finetune": 1, "batch_size": 32, "lr": 1e-2, "device": "cpu"}


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    x, y = data.tensors
    return float((model.eval()(x).argmax(-1) == y).double().mean())


def make_net() -> nn.Module:
    return network()


def make_data() -> Splits:
    train, calibration, test = (ArrayDataset(*images(count).tensors) for count in (192, 30, 60))
    return Splits(train, calibration, test, classes=3, name="stripes")


def make_other() -> nn.Module:
    """Of the same inputs and classes, and nothing else."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
