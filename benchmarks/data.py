"""The data sets of ../shared/data as Splits, for benchmarks, and the embedded digits.

Images come as uint8 arrays and are handed out in 0..1; where there is no calibration split, it is taken from train.
"""

import importlib.util
from collections.abc import Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from common import DATA, QUICK
from torch.utils.data import Dataset, Subset

from dyncompress import RequestError, load_data
from dyncompress.compress.training.batches import size_of
from dyncompress.model_zoo.data.splits import divide
from dyncompress.model_zoo.load_data import ArrayDataset, Splits
from dyncompress.model_zoo.text.words import CLASS, PADDING, UNKNOWN, padded

TEXTS = {"wikitext2": "wikitext2", "sst2": "sst2", "clinc150": "clinc150", "banking77": "banking77"}
TEXTS |= {"xquad": "xquad/xquad.en.json"}
FEW = 256  # samples of a part, with --quick
NAMES = ("fashion_mnist", "mnist", "cifar10", "ag_news", *TEXTS)


def splits(name: str, length: int | None = None, seed: int = 0) -> Splits:
    """A data set by name; length: words of a sentence, window or context, None = what `text:DIR` takes.

    With --quick it is `few` samples. Raises RequestError for an unknown name.
    """
    found = _whole(name, length, seed)
    return few(found) if QUICK else found


def few(whole: Splits) -> Splits:
    """The first samples of every part."""
    train, calibration, test = (take(samples, FEW) for _, samples in whole.items())
    return replace(whole, train=train, calibration=calibration, test=test)


def present(names: Iterable[str]) -> list[str]:
    """The names without the data sets that are not there."""
    return [name for name in names if name not in NAMES or DATA.is_dir()]


def take(samples: Dataset[Any], count: int) -> Dataset[Any]:
    """The first of them, or all where they are fewer."""
    return Subset(samples, range(min(count, size_of(samples, "benchmark's"))))


def _whole(name: str, length: int | None, seed: int) -> Splits:
    if name == "digits":
        return load_data(name, seed)
    if name not in NAMES:
        raise RequestError(f"there is no data set {name!r}: use digits, {', '.join(NAMES)}")
    if name in TEXTS:
        option = f"?length={length}" if length is not None else ""
        return load_data(f"text:{DATA / TEXTS[name]}{option}", seed)
    if name == "ag_news":
        return _ag_news(length, seed)
    x_train, y_train, x_test, y_test = _reader().cifar10() if name == "cifar10" else _reader().mnist(name)
    parts = {"train": _images(x_train, y_train), "test": _images(x_test, y_test)}
    return divide({**parts}, int(y_train.max()) + 1, name, seed)


def _images(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> ArrayDataset:
    x = torch.from_numpy(np.ascontiguousarray(images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)))
    return ArrayDataset(x, torch.from_numpy(labels.astype(np.int64)))


def _ag_news(length: int | None, seed: int) -> Splits:
    """Ids shifted by two: 0 is padding, 1 the file's own unknown word, 2 the class token in front."""
    with np.load(DATA / "ag_news" / "ag_news.npz") as file:
        vocabulary = (PADDING, UNKNOWN, CLASS, *file["vocab"][1:].tolist())
        class_names = tuple(file["classes"].tolist())
    parts = {}
    for part in ("train", "test"):
        texts, labels = _reader().ag_news(part)
        rows = [[2, *(np.where(ids == 0, -1, ids).astype(np.int64) + 2).tolist()] for ids in texts]
        length = length or max(map(len, rows))
        parts[part] = ArrayDataset(padded(rows, length), torch.from_numpy(labels.astype(np.int64)))
    made = divide({**parts}, len(class_names), "ag_news", seed)
    return Splits(made.train, made.calibration, made.test, made.classes, made.name, vocabulary, class_names)


def _reader() -> ModuleType:
    """The module that comes with the data sets."""
    spec = importlib.util.spec_from_file_location("shared_load", DATA / "load.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
