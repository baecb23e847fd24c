"""The data sets of ../shared/data as Splits, for benchmarks; `available` says whether they are there.

Images come as uint8 arrays and are handed out in 0..1; where there is no calibration split, it is taken from train.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from dyncompress import RequestError, load_data
from dyncompress.model_zoo.data.splits import divide
from dyncompress.model_zoo.load_data import ArrayDataset, Splits
from dyncompress.model_zoo.text.words import CLASS, PADDING, UNKNOWN, padded

FOLDER = Path(__file__).parents[2] / "shared" / "data"
TEXTS = {"wikitext2": "wikitext2", "sst2": "sst2", "clinc150": "clinc150", "banking77": "banking77"}
TEXTS |= {"xquad": "xquad/xquad.en.json"}
NAMES = ("fashion_mnist", "mnist", "cifar10", "ag_news", *TEXTS)


def available() -> bool:
    """Whether the data sets are there: what needs them is skipped where they are not."""
    return (FOLDER / "load.py").is_file()


def splits(name: str, length: int | None = None, seed: int = 0) -> Splits:
    """A data set by name; length: words of a sentence, window or context, None = what `text:DIR` takes.

    Raises RequestError for a name that is not in NAMES, or where the data sets are not there.
    """
    if name not in NAMES:
        raise RequestError(f"there is no data set {name!r}: use one of {', '.join(NAMES)}")
    if not available():
        raise RequestError(f"the data sets of benchmarks are not in {FOLDER}: put them there, or leave this one out")
    if name in TEXTS:
        option = f"?length={length}" if length is not None else ""
        return load_data(f"text:{FOLDER / TEXTS[name]}{option}", seed)
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
    with np.load(FOLDER / "ag_news" / "ag_news.npz") as file:
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
    spec = importlib.util.spec_from_file_location("shared_load", FOLDER / "load.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
