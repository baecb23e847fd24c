"""`package.module:factory`: a user's own function that returns Splits, or a (train, test) pair of datasets."""

import importlib
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from ...errors import RequestError
from .arrays import count_classes
from .source_text import SOURCES
from .splits import CALIBRATION_SHARE, Splits, stratified_split

_IGNORED = -100  # the label of a position that counts for nothing


def load_factory(source: str, seed: int) -> Splits:
    """The splits that the function at `package.module:factory` returns; it is called without arguments.

    For a (train, test) pair, calibration is split off train and the labels are read from every sample once.
    The working directory is searched too. Raises RequestError when the function cannot be found, fails, or returns
    something else than non-empty datasets of (tensor, int label), or of (tensor, labels (T,)) where -100 counts for
    nothing.
    """
    with _working_directory_importable():
        result = _call(_find(source), source)
    if isinstance(result, Splits):
        return _checked(result)
    if not (isinstance(result, (tuple, list)) and len(result) == 2):
        raise RequestError(f"{source} returned {_kind(result)}: return Splits, or a (train, test) pair of datasets")
    train, test = result
    for part, data in (("train", train), ("test", test)):
        _check_dataset(data, f"{source}: {part}")
    labels = {"train": _labels(train), "test": _labels(test)}
    classes = count_classes({part: torch.cat(found) for part, found in labels.items()}, source)
    strata = torch.zeros(len(train)) if _per_position(train[0][1]) else torch.cat(labels["train"])
    shares = (1 - CALIBRATION_SHARE, CALIBRATION_SHARE)
    kept, taken = (ids.tolist() for ids in stratified_split(strata, shares, seed))
    return _checked(Splits(Subset(train, kept), Subset(train, taken), test, classes, source))


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """Console scripts, unlike `python -m`, do not search the working directory; it comes last, to shadow nothing."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _find(source: str) -> Callable[[], Any]:
    module_name, _, path = source.partition(":")
    try:
        found = operator.attrgetter(path)(importlib.import_module(module_name))
    except ModuleNotFoundError as error:
        raise RequestError(f"{source}: {error}: install it, or use {SOURCES}") from error
    except AttributeError as error:
        raise RequestError(f"{source}: {error}: check the function's name") from error
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise RequestError(f"{source}: importing {module_name} failed: {_reason(error)}") from error
    if not callable(found):
        raise RequestError(f"{source} is {_kind(found)}, not a function: name a function that returns Splits")
    return found


def _call(function: Callable[[], Any], source: str) -> Any:
    try:
        return function()
    except RequestError:
        raise
    except Exception as error:  # a user's function may fail in any way
        raise RequestError(f"{source}() failed: {_reason(error)}") from error


def _checked(splits: Splits) -> Splits:
    for part, data in splits.items():
        _check_dataset(data, f"{splits.name}: {part}")
    return splits


def _check_dataset(data: Any, where: str) -> None:
    """Non-empty, with a finite tensor and whole numbers in its first item; the other items are trusted."""
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise RequestError(f"{where} is {_kind(data)}: give a torch Dataset with a length")
    if len(data) == 0:
        raise RequestError(f"{where} is empty: give at least one sample")
    item = data[0]
    if not (isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], Tensor)):
        raise RequestError(f"{where}: its first item is {_kind(item)}, not (input tensor, int label) or labels (T,)")
    _label(item[1], where)
    if item[0].is_floating_point() and not bool(item[0].isfinite().all()):
        raise RequestError(f"{where}: its first input holds NaN or infinity: clean the data")


def _label(label: Any, where: str) -> Tensor:
    """The label of one sample, (1,), or those of its positions that count; int64."""
    if _per_position(label):
        values = label[label != _IGNORED].long()
    else:
        try:
            values = torch.tensor([operator.index(label)])
        except TypeError as error:
            raise RequestError(f"{where}: label {label!r} is no whole number: labels must be 0..classes-1") from error
    if bool((values < 0).any()):
        raise RequestError(f"{where}: label {int(values.min())} is out of range: labels start at 0")
    return values


def _per_position(label: Any) -> bool:
    return isinstance(label, Tensor) and label.dim() == 1 and not label.is_floating_point()


def _labels(data: Any) -> list[Tensor]:
    return [_label(data[index][1], f"sample {index}") for index in range(len(data))]


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
