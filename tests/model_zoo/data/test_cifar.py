"""CIFAR-10's binary files: what is read, and one line for every mistake."""

from pathlib import Path

import numpy as np
import torch
from data import refusal, write

from dyncompress.model_zoo import load_data


def test_cifar10_is_read_plane_by_plane(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (24, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(24, dtype=np.uint8) % 10
    records = np.concatenate((labels[:, None], images.reshape(24, -1)), axis=1)
    write(tmp_path, data_batch_1__bin=records[:10].tobytes(), data_batch_2__bin=records[10:20].tobytes())
    write(tmp_path, test_batch__bin=records[20:].tobytes())
    splits = load_data(f"cifar10:{tmp_path}")
    assert splits.classes == 10 and len(splits.train) + len(splits.calibration) == 20
    for row, (x, y) in enumerate(splits.test, start=20):
        assert torch.equal(x, torch.from_numpy(images[row]) / 255) and y == labels[row]


def test_mistakes_in_cifar10(tmp_path: Path) -> None:
    source = f"cifar10:{tmp_path}"
    assert "no data_batch_1.bin or test_batch.bin" in refusal(source)
    write(tmp_path, data_batch_1__bin=bytes(3073), test_batch__bin=bytes(3000))
    assert "test_batch.bin has 3000 bytes, not a multiple of 3073" in refusal(source)
