"""`cifar10:DIR`: the public binary version of CIFAR-10, data_batch_1.bin to data_batch_5.bin and test_batch.bin."""

from pathlib import Path

import numpy as np
import torch

from ...errors import RequestError
from .arrays import count_classes
from .splits import ArrayDataset, Splits, divide

_IMAGE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the red, green and blue planes


def load_cifar10(folder: str, seed: int) -> Splits:
    """(3, 32, 32) float in 0..1 in 10 classes; calibration is taken from the training batches that are there.

    Raises RequestError for a folder without these files, or files of another form.
    """
    name, root = f"cifar10:{folder}", Path(folder).expanduser()
    batches, test = sorted(root.glob("data_batch_*.bin")), root / "test_batch.bin"
    if not batches or not test.is_file():
        raise RequestError(f"{name}: there is no data_batch_1.bin or test_batch.bin: unpack CIFAR-10's binary version")
    parts = {"train": _read(batches), "test": _read([test])}
    classes = count_classes({part: data.labels for part, data in parts.items()}, name)
    return divide({**parts}, classes, name, seed)


def _read(files: list[Path]) -> ArrayDataset:
    for path in files:
        size = path.stat().st_size
        if not size or size % _RECORD:
            raise RequestError(
                f"{path} has {size} bytes, not a multiple of {_RECORD}: it is cut short or something else"
            )
    records = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, _RECORD) for path in files])
    images = torch.from_numpy(records[:, 1:].reshape(-1, *_IMAGE).copy())
    return ArrayDataset(images, torch.from_numpy(records[:, 0].astype(np.int64)))
