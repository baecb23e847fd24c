"""The embedded data source: scikit-learn's handwritten digits, enlarged to 32x32 and made hard enough to need depth.

The 1,797 originals are divided first and drawn from afterwards, so no variant of a test digit is ever trained on.
The division is the same for every seed: with another one, the trained checkpoints would have seen test digits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import augment
from .splits import ArrayDataset, Splits, stratified_split

SHARES = (0.60, 0.15, 0.25)  # train, calibration, test: of the originals
TRAIN_DRAWS = 10
HELD_OUT_DRAWS = 8
# Seeds of the pools lie this far apart, so that neighbouring seeds share none with each other or with training.
_STREAM = 1_000_003


@dataclass(frozen=True)
class Originals:
    """Undistorted digits: images (N, 1, 8, 8) float in 0..1, labels (N,) int64, ids (N,) rows in the source."""

    images: Tensor
    labels: Tensor
    ids: Tensor


def originals() -> tuple[Originals, Originals, Originals]:
    """The train, calibration and test originals: disjoint, stratified by class, always the same."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(source.target).long()
    train, calibration, test = (
        Originals(images[ids], labels[ids], ids) for ids in stratified_split(labels, SHARES, seed=0)
    )
    return train, calibration, test


def pool(source: Originals, draws: int, seed: int) -> ArrayDataset:
    """`draws` distorted variants of every original: draws*N images (1, 32, 32), all originals once per round."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [augment.draw(source.images, generator) for _ in range(draws)]
    return ArrayDataset(torch.cat(rounds), source.labels.repeat(draws))


def digits(seed: int = 0) -> Splits:
    """About 10,800 training, 2,200 calibration and 3,600 test images (1, 32, 32) float in 0..1, in 10 classes.

    The same seed gives the same images; another one distorts the same originals differently.
    """
    train, calibration, test = originals()
    return Splits(
        train=pool(train, TRAIN_DRAWS, seed * _STREAM + 1),
        calibration=pool(calibration, HELD_OUT_DRAWS, seed * _STREAM + 2),
        test=pool(test, HELD_OUT_DRAWS, seed * _STREAM + 3),
        classes=10,
        name="digits",
    )
