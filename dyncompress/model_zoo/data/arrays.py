"""Arrays from outside, checked and turned into the tensors the splits hold."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import RequestError

_CHANNEL_COUNTS = (1, 3, 4)


def to_inputs(array: np.ndarray[Any, Any], where: str) -> Tensor:
    """Inputs (N, ...): uint8 images as uint8 NCHW, floats as float32, other integers as int64.

    uint8 (N, H, W) gains a channel, (N, H, W, C) is transposed. `where` names the array in messages.
    Raises RequestError for an array that is empty, not numeric, of no sample dimension, or holds NaN or infinity.
    """
    if array.ndim < 2:
        raise RequestError(f"{where} has shape {array.shape}: inputs need shape (samples, ...)")
    if array.size == 0:
        raise RequestError(f"{where} is empty (shape {array.shape}): give at least ten samples")
    if array.dtype == np.uint8:
        return torch.from_numpy(_channels_first(array, where))
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    if array.dtype.kind not in "fb":
        raise RequestError(f"{where} holds {array.dtype}: inputs must be numbers (uint8 images or floats)")
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array.reshape(len(array), -1)).all(axis=1)))
        raise RequestError(f"{where} holds NaN or infinity, first in sample {row}: clean or drop such samples")
    return torch.from_numpy(array.astype(np.float32))


def _channels_first(images: np.ndarray[Any, Any], where: str) -> np.ndarray[Any, Any]:
    if images.ndim == 3:
        return np.ascontiguousarray(images[:, None])
    if images.ndim != 4:
        return images
    if images.shape[3] in _CHANNEL_COUNTS:
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if images.shape[1] in _CHANNEL_COUNTS:
        return images
    raise RequestError(
        f"{where} has shape {images.shape}: uint8 images need shape (N, H, W[, C]) with 1, 3 or 4 channels"
    )


def to_labels(array: np.ndarray[Any, Any], where: str) -> Tensor:
    """Class indices (N,) or (N, 1) of an integer dtype, or of whole floats, as int64 (N,).

    Raises RequestError for labels that are not one non-negative whole number per sample.
    """
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise RequestError(f"{where} has shape {array.shape}: give one class index per sample, shape (samples,)")
    if array.dtype.kind not in "iufb":
        raise RequestError(f"{where} holds {array.dtype}: labels must be whole numbers 0, 1, 2, ...")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.round(array)).all()):
        raise RequestError(f"{where} holds fractions or NaN: labels must be whole numbers 0, 1, 2, ...")
    labels = torch.from_numpy(array.astype(np.int64))
    if len(labels) and int(labels.min()) < 0:
        raise RequestError(f"{where} holds {int(labels.min())}: labels start at 0")
    return labels


def count_classes(labels: dict[str, Tensor], name: str) -> int:
    """The number of classes, one more than the largest training label; `labels` maps split to labels (N,).

    Raises RequestError for a held-out label that training never reaches, or labels that cannot be class indices.
    """
    train = labels["train"]
    if len(train) == 0:
        raise RequestError(f"{name}: there are no training samples: give at least ten")
    classes = int(train.max()) + 1
    if classes > len(train):
        raise RequestError(
            f"{name}: label {classes - 1} is out of range for {len(train)} training samples: "
            "labels must be class indices 0..classes-1"
        )
    if classes < 2:
        raise RequestError(f"{name}: every training label is 0: a classifier needs two classes or more")
    for part, held_out in labels.items():
        if len(held_out) and int(held_out.max()) >= classes:
            raise RequestError(
                f"{name}: {part} label {int(held_out.max())} is out of range: training labels are 0..{classes - 1}"
            )
    return classes
