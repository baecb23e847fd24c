"""`npz:FILE`: numpy archives with x_train, y_train[, x_val, y_val][, x_test, y_test], or x, y."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import RequestError
from .arrays import count_classes, to_inputs, to_labels
from .splits import ArrayDataset, LabelledDataset, Splits, divide

_KEYS = {
    "train": (("x_train", "y_train"), ("x", "y")),
    "calibration": (("x_val", "y_val"),),
    "test": (("x_test", "y_test"),),
}

Arrays = dict[str, np.ndarray[Any, Any]]


def load_npz(file: str, seed: int) -> Splits:
    """The splits of a numpy archive; x_val becomes calibration, missing splits are taken from train.

    Raises RequestError when the file or a key is missing, or an array is not what its key promises.
    """
    name = f"npz:{file}"
    arrays = _read(Path(file).expanduser(), name)
    parts: dict[str, LabelledDataset] = {}
    for part, candidates in _KEYS.items():
        data = _first_pair(arrays, candidates, name)
        if data is not None:
            parts[part] = data
    if "train" not in parts:
        raise RequestError(f"{name}: found {_listed(arrays)}; name the arrays x_train and y_train, or x and y")
    _check_same_shape(parts, name)
    classes = count_classes({part: data.labels for part, data in parts.items()}, name)
    return divide(parts, classes, name, seed)


def _read(path: Path, name: str) -> Arrays:
    if not path.is_file():
        raise RequestError(f"{name}: there is no such file: check the path")
    try:
        # Opened here, because np.load leaves its own file open when the archive is broken.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            wanted = [key for pairs in _KEYS.values() for pair in pairs for key in pair]
            return {key: archive[key] for key in wanted if key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
        # AttributeError and TypeError: np.load gave a bare array, because the file is a .npy under another name.
        raise RequestError(f"{name}: not a readable npz archive of plain arrays ({_first_line(error)})") from error


def _first_pair(arrays: Arrays, candidates: tuple[tuple[str, str], ...], name: str) -> ArrayDataset | None:
    for x_key, y_key in candidates:
        present = [key for key in (x_key, y_key) if key in arrays]
        if len(present) == 1:
            missing = y_key if present == [x_key] else x_key
            raise RequestError(f"{name}: has {present[0]} but no {missing}: store both")
        if present:
            return _pair(arrays, x_key, y_key, name)
    return None


def _pair(arrays: Arrays, x_key: str, y_key: str, name: str) -> ArrayDataset:
    inputs = to_inputs(arrays[x_key], f"{name}: {x_key}")
    labels = to_labels(arrays[y_key], f"{name}: {y_key}")
    if len(inputs) != len(labels):
        raise RequestError(f"{name}: {x_key} has {len(inputs)} samples and {y_key} has {len(labels)}: they must agree")
    return ArrayDataset(inputs, labels)


def _check_same_shape(parts: dict[str, LabelledDataset], name: str) -> None:
    kinds = {
        part: (tuple(d.inputs.shape[1:]), d.inputs.dtype) for part, d in parts.items() if isinstance(d, ArrayDataset)
    }
    for part, kind in kinds.items():
        if kind != kinds["train"]:
            raise RequestError(
                f"{name}: {part} samples are {kind[0]} {kind[1]}, training samples {kinds['train'][0]} "
                f"{kinds['train'][1]}: store them alike"
            )


def _listed(arrays: Arrays) -> str:
    return f"only {', '.join(arrays)}" if arrays else "none of the expected arrays"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
