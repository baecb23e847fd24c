"""What a data source gives: three splits of (input, label) pairs, and how missing splits are taken from train.

The stratified split. Samples are shuffled, then sorted by class; the sample at position p of that order has
u_p = frac((p + 1/2) * golden ratio) and goes to the split whose interval of cumulated shares holds u_p. The golden
sequence is evenly spread over every run of positions, so every class - and the whole, even with one sample per
class - is divided close to the shares.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import RequestError

TEST_SHARE = 0.2  # of all samples, where a source brings no test split
CALIBRATION_SHARE = 0.15  # of what is left for training, where a source brings no calibration split

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Splits:
    """A data source, ready to use. Every split is a map-style Dataset of (input tensor, int label).

    Readers have two inputs; language models and readers a tensor of labels, one per position (`text` says which).
    train fits weights, calibration chooses thresholds and temperatures, test is only ever reported on.
    classes: number of classes; labels are 0..classes-1. name: the SOURCE it was made from.
    vocabulary: the words that token ids stand for, by id; class_names: the labels by number; () where there are none.
    """

    train: Dataset[Any]
    calibration: Dataset[Any]
    test: Dataset[Any]
    classes: int
    name: str
    vocabulary: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    def items(self) -> list[tuple[str, Dataset[Any]]]:
        """The three splits with their names, in the order train, calibration, test."""
        return [("train", self.train), ("calibration", self.calibration), ("test", self.test)]


class LabelledDataset(Dataset[tuple[Tensor, int]], ABC):
    """A dataset whose labels (N,) int64 are known without reading its inputs, so that it can be split."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def select(self, indices: Tensor) -> "LabelledDataset":
        """The samples at these indices, as a new dataset."""


class ArrayDataset(LabelledDataset):
    """Samples held in memory: inputs (N, ...) and labels (N,) int64; item i is (input, label).

    uint8 inputs are kept as bytes and handed out as float32 / 255; others are handed out as they are.
    """

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs = inputs
        self.labels = labels

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return as_float(self.inputs[index]), int(self.labels[index])

    def select(self, indices: Tensor) -> "ArrayDataset":
        return ArrayDataset(self.inputs[indices], self.labels[indices])


def as_float(x: Tensor) -> Tensor:
    """Bytes 0..255 as float32 0..1; any other dtype unchanged."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def stratified_split(labels: Tensor, shares: Sequence[float], seed: int) -> list[Tensor]:
    """Divide the indices of labels (N,) into len(shares) sorted, disjoint index tensors; shares sum to 1.

    Every class is divided in about the given shares. The same seed gives the same split.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    position = torch.arange(len(labels), dtype=torch.float64)
    spread = ((position + 0.5) * _GOLDEN).frac()
    edges = torch.tensor(shares, dtype=torch.float64).cumsum(0)[:-1]
    part = torch.bucketize(spread, edges, right=True)
    return [by_class[part == k].sort().values for k in range(len(shares))]


def divide(parts: dict[str, LabelledDataset], classes: int, name: str, seed: int) -> Splits:
    """Splits from `parts`, which has "train" and perhaps "calibration" and "test"; missing ones come off train.

    Raises RequestError when a split comes out empty.
    """
    parts = dict(parts)
    if "test" not in parts:
        parts["train"], parts["test"] = take_off(parts["train"], TEST_SHARE, seed)
    if "calibration" not in parts:
        parts["train"], parts["calibration"] = take_off(parts["train"], CALIBRATION_SHARE, seed + 1)
    for part, data in parts.items():
        if len(data) == 0:
            raise RequestError(f"{name}: too few samples for a {part} split: give ten or more")
    return Splits(parts["train"], parts["calibration"], parts["test"], classes, name)


def take_off(data: LabelledDataset, share: float, seed: int) -> tuple[LabelledDataset, LabelledDataset]:
    """(the rest, the share taken off): stratified, seeded, without overlap."""
    kept, taken = stratified_split(data.labels, (1 - share, share), seed)
    return data.select(kept), data.select(taken)
