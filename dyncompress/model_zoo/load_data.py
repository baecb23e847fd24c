"""Labelled data by name, such as `digits`, `npz:FILE` or `text:DIR`; `options.SOURCES` lists all."""

import re
from collections.abc import Callable
from dataclasses import replace

from ..errors import RequestError
from .data.cifar import load_cifar10
from .data.digits import digits
from .data.factory import load_factory
from .data.hub import load_hub
from .data.imagefolder import load_imagefolder
from .data.npz import load_npz
from .data.source_text import SOURCES
from .data.splits import ArrayDataset, Splits
from .text.text import load_text

__all__ = ["ArrayDataset", "Splits", "load_data"]

_LOADERS: dict[str, Callable[[str, int], Splits]] = {
    "npz": load_npz,
    "imagefolder": load_imagefolder,
    "hf": load_hub,
    "text": load_text,
    "cifar10": load_cifar10,
}
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def load_data(source: str, seed: int = 0) -> Splits:
    """The train, calibration and test splits of SOURCE; their name is SOURCE.

    seed decides the digits' distortions, and which samples become the splits that a source does not bring.
    Raises RequestError, in one line, for an unknown source and for every mistake in the data.
    """
    if source == "digits":
        return digits(seed)
    scheme, _, rest = source.partition(":")
    if scheme in _LOADERS:
        if not rest:
            raise RequestError(f"{source!r} names no file or folder: write {scheme}:PATH")
        return replace(_LOADERS[scheme](rest, seed), name=source)
    if _FACTORY.fullmatch(source):
        return replace(load_factory(source, seed), name=source)
    raise RequestError(f"unknown data source {source!r}: use {SOURCES}")
