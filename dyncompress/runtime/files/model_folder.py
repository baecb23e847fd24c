"""A folder that holds a model in shards: its file names, and whether it is whole."""

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import RequestError
from .shards import INDEX, read_header, read_tensor
from .tensor_file import read_file

GRAPH = "graph.dyn"
JOURNAL = "unfinished.json"
SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_HASHED_BYTES = 2**22


def shard_name(number: int, count: int) -> str:
    """The file name of shard `number`, from 0, of `count`, as Hugging Face writes it."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def is_finished(folder: Path) -> bool:
    """Whether a folder is whole."""
    return (folder / INDEX).is_file() and (folder / GRAPH).is_file() and not (folder / JOURNAL).exists()


def is_model_folder(path: Path) -> bool:
    """Whether a path is a folder that holds, or is going to hold, a model with its graph."""
    return path.is_dir() and any((path / name).is_file() for name in (GRAPH, JOURNAL))


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model's document and all of its tensors, each in memory of its own.

    Raises:
        RequestError: the folder is unfinished, or its files are missing or damaged.
    """
    if not is_finished(folder):
        raise RequestError(f"{folder} is unfinished: run the command that makes it again; it goes on where it stopped")
    document, tensors = read_file(folder / GRAPH)
    shards = document.pop("shards", None)
    if not isinstance(shards, dict) or not all(SHARD.fullmatch(name) for name in shards):
        raise RequestError(f"{folder / GRAPH} is damaged: it names no shards")
    for name, digest in shards.items():
        stored = read_header(folder / name)
        if _digest(folder / name) != digest:
            raise RequestError(f"{folder / name} is damaged: it does not match its SHA-256; copy or write it again")
        tensors |= {tensor: read_tensor(entry) for tensor, entry in stored.items()}
    return document, tensors


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(_HASHED_BYTES):
            digest.update(block)
    return digest.hexdigest()
