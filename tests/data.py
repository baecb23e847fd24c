"""Small data sets that tests share, the same at every call but where it is said; what sources say of wrong files."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from dyncompress.errors import RequestError
from dyncompress.model_zoo.load_data import ArrayDataset, Splits, load_data

PUBLIC = Path(__file__).parents[1] / "../shared/data"  # data sets, where somebody has put them
RNG = np.random.default_rng(0)


def stripes(count: int = 192, seed: int = 0, noise: float = 0.4) -> TensorDataset:
    """Images (1, 8, 8) of stripes along rows, along columns, or neither, in noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    stripe = torch.tensor([1.0, -1.0]).repeat(4)
    patterns = torch.stack([stripe[:, None].expand(8, 8), stripe.expand(8, 8), torch.zeros(8, 8)])
    return TensorDataset(patterns[y][:, None] + noise * torch.randn(count, 1, 8, 8, generator=generator), y)


@cache
def make_stripes() -> Splits:
    parts = (ArrayDataset(*stripes(count, seed, 0.8).tensors) for seed, count in enumerate((240, 120, 90)))
    return Splits(*parts, classes=3, name="stripes")


@cache
def digits() -> Splits:
    """The 8x8 digits with noise of a different strength for every image."""
    from sklearn.datasets import load_digits  # takes longer to import than what the other data sets are used for

    source = load_digits()
    x, y = torch.from_numpy(source.images).float().unsqueeze(1) / 16, torch.from_numpy(source.target).long()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(y), generator=generator)
    strength = 0.5 * torch.rand(len(y), 1, 1, 1, generator=generator)
    x = (x + strength * torch.randn(x.shape, generator=generator))[order]
    parts = zip(x.split([1000, 400, 397]), y[order].split([1000, 400, 397]), strict=True)
    return Splits(*(TensorDataset(*part) for part in parts), classes=10, name="noisy digits")


def signs(count: int = 512) -> TensorDataset:
    """Vectors of 8 in four classes, by the signs of a product and of a sum; the labels are those of a fixed rule."""
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, 2 * (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] + x[:, 3] > 0).long())


def counting(count: int = 320) -> TensorDataset:
    """Counting modulo 11 from anywhere, labelled with the next number at every position."""
    start = torch.arange(count)[:, None] + torch.arange(10)
    return TensorDataset(start[:, :-1] % 11, start[:, 1:] % 11)


def text_batch(n: int) -> dict[str, Tensor]:
    """Token ids of random lengths, other ones at every call, with their mask."""
    lengths = torch.randint(1, 8, (n, 1))
    return {"input_ids": torch.randint(0, 50, (n, 7)), "attention_mask": (torch.arange(7) < lengths).long()}


def pictures(count: int, *shape: int) -> np.ndarray[Any, Any]:
    """Random bytes, other ones at every call."""
    return RNG.integers(0, 256, (count, *(shape or (6, 5))), dtype=np.uint8)


def classes(count: int, number: int = 3) -> np.ndarray[Any, Any]:
    return np.arange(count) % number


def write(folder: Path, **files: str | bytes) -> str:
    """The SOURCE of a folder with these files; two underscores in a name are a dot."""
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"text:{folder}"


def refusal(source: str) -> str:
    """The message of the one-line RequestError that this source must give."""
    with pytest.raises(RequestError) as caught:
        load_data(source)
    message = str(caught.value)
    assert "\n" not in message
    return message
