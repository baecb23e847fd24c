"""`hf:NAME_OR_DIR[?config=...&size=...]`: Hugging Face datasets of images, or of numeric columns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...errors import RequestError
from .arrays import count_classes, to_inputs, to_labels
from .images import ImageDataset, common_mode
from .source_text import parse_size, split_options
from .splits import ArrayDataset, LabelledDataset, Splits, divide

if TYPE_CHECKING:
    from PIL import Image

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "calibration": ("validation", "val", "valid", "dev", "calibration"),
    "test": ("test",),
}
_LABEL_NAMES = ("label", "labels", "y", "target", "class", "fine_label")
_ROW_NAMES = ("id", "idx", "index")  # numbers that count rows, not features of a sample


@dataclass(frozen=True)
class _Column:
    """Reads one image column by row."""

    table: Any
    name: str

    def __call__(self, row: int) -> Image.Image:
        image: Image.Image = self.table[row][self.name]
        return image


def load_hub(text: str, seed: int) -> Splits:
    """The splits of a dataset on the Hugging Face hub or in a local folder (also one written by save_to_disk).

    The label is the ClassLabel column, or an integer column called label, y, target or class. Inputs are the image
    column, (C, H, W) float32 in 0..1 of one size, or else the numeric columns as one float32 vector or array.
    Raises RequestError when the library is missing, the dataset cannot be loaded, or has no such columns.
    """
    target, options = split_options(text, ("config", "size"))
    name = f"hf:{target}"
    tables = _named_splits(_load(target, options.get("config"), name), name)
    label = _label_column(tables["train"], name)
    labels = {part: to_labels(np.array(table[label]), f"{name}: {part} {label}") for part, table in tables.items()}
    classes = count_classes(labels, name)
    images = _image_column(tables["train"])
    parts: dict[str, LabelledDataset] = {}
    if images is not None:
        parts.update(_image_parts(tables, labels, images, parse_size(options, name), name))
    else:
        columns = _numeric_columns(tables["train"], label, name)
        for part, table in tables.items():
            inputs = to_inputs(_stack(table, columns, name), f"{name}: {part} {', '.join(columns)}")
            parts[part] = ArrayDataset(inputs, labels[part])
    return divide(parts, classes, name, seed)


def _load(target: str, config: str | None, name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise RequestError(f"{name} needs the datasets library: pip install datasets") from error
    folder = Path(target).expanduser()
    if target.startswith((".", "/", "~")) and not folder.is_dir():
        raise RequestError(f"{name}: there is no such folder: check the path")
    where = str(folder) if folder.is_dir() else target
    saved = any((folder / marker).is_file() for marker in ("dataset_dict.json", "state.json"))
    try:
        return datasets.load_from_disk(where) if saved else datasets.load_dataset(where, config)
    except Exception as error:  # the library raises many unrelated types: missing, offline, broken, needs a config
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(f"{name} cannot be loaded: {reason}") from error


def _named_splits(loaded: Any, name: str) -> dict[str, Any]:
    """Tables by our split names; a single table is train."""
    if not isinstance(loaded, dict):
        return {"train": loaded}
    tables: dict[str, Any] = {}
    for part, candidates in _SPLIT_NAMES.items():
        for candidate in candidates:
            if candidate in loaded:
                tables.setdefault(part, loaded[candidate])
    if "train" not in tables:
        raise RequestError(f"{name} has the splits {', '.join(loaded)}: one must be called train")
    return tables


def _label_column(table: Any, name: str) -> str:
    features = table.features
    marked = [column for column, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    named = [column for column in _LABEL_NAMES if column in features and _is_number(features[column])]
    for column in [c for c in named if c in marked] + marked + named:
        return column
    raise RequestError(
        f"{name} has no label column among {', '.join(features)}: it needs a ClassLabel, or whole numbers called "
        f"{', '.join(_LABEL_NAMES[:-1])}"
    )


def _is_number(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    return type(feature).__name__ in ("Value", "ClassLabel") and dtype.startswith(("int", "uint", "float", "bool"))


def _is_nested_number(feature: Any) -> bool:
    """Whether the column holds lists or arrays of numbers, to any depth."""
    if type(feature).__name__.startswith("Array"):
        return True
    inner = getattr(feature, "feature", None)
    return inner is not None and (_is_number(inner) or _is_nested_number(inner))


def _image_column(table: Any) -> str | None:
    columns = [column for column, feature in table.features.items() if type(feature).__name__ == "Image"]
    return columns[0] if columns else None


def _image_parts(
    tables: dict[str, Any],
    labels: dict[str, torch.Tensor],
    column: str,
    size: tuple[int, int] | None,
    name: str,
) -> dict[str, ImageDataset]:
    first: Image.Image = tables["train"][0][column]
    # Only the first image is looked at: reading every header would decode, or download, the whole set.
    mode = common_mode({first.mode}, name)
    size = size or (first.height, first.width)
    return {
        part: ImageDataset(_Column(table, column), torch.arange(len(table)), labels[part], size, mode)
        for part, table in tables.items()
    }


def _numeric_columns(table: Any, label: str, name: str) -> list[str]:
    """The input columns: one column of arrays, or all columns of single numbers."""
    features = {c: f for c, f in table.features.items() if c != label and c not in _ROW_NAMES}
    text = [c for c, f in features.items() if str(getattr(f, "dtype", "")) in ("string", "large_string")]
    if text:
        raise RequestError(f"{name}: column {text[0]!r} is text: only images and numbers are read; drop or encode it")
    nested = [c for c, f in features.items() if _is_nested_number(f)]
    flat = [c for c, f in features.items() if _is_number(f)]
    if len(nested) == 1 and not flat:
        return nested
    if flat and not nested:
        return flat
    raise RequestError(
        f"{name}: no single input among {', '.join(features) or 'no columns'}: keep one image column, one array "
        "column, or only columns of single numbers"
    )


def _stack(table: Any, columns: list[str], name: str) -> np.ndarray[Any, Any]:
    try:
        arrays = [np.array(table[column], dtype=np.float32) for column in columns]
    except (ValueError, TypeError) as error:
        raise RequestError(
            f"{name}: {', '.join(columns)} holds gaps or arrays of different shapes: make them alike"
        ) from error
    return arrays[0] if arrays[0].ndim > 1 else np.stack(arrays, axis=1)
