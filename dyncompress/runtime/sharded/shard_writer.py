"""Writing safetensors shards piece by piece: a file stands under its name only when all of it is on the disk."""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ...errors import DynCompressError
from ..files.shards import DTYPES

TEMPORARY = ".*.tmp"  # pattern of what a killed process leaves


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its name, its dtype as safetensors spells it, its shape and its length in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def pack(tensors: Iterable[Planned], max_bytes: int) -> list[list[Planned]]:
    """Consecutive tensors in shards of at most `max_bytes` of data; a larger tensor has a shard to itself."""
    shards: list[list[Planned]] = [[]]
    room = max_bytes
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def write_shard(
    path: Path, tensors: Sequence[Planned], pieces: Callable[[str], Iterator[Tensor]], written: Callable[[int], object]
) -> str:
    """Writes one shard and returns the SHA-256 of the file.

    Args:
        pieces: the blocks of rows of the tensor of this name, in order.
        written: told the bytes of each block that was written.

    Raises:
        DynCompressError: the file cannot be written (disk full, no permission).
    """
    ordered = sorted(tensors, key=lambda t: -DTYPES[t.dtype].itemsize)  # wide numbers first: every tensor stays aligned
    digest = hashlib.sha256()
    with replacing(path) as file:
        header = _header(ordered)
        digest.update(header)
        file.write(header)
        for tensor in ordered:
            for piece in pieces(tensor.name):
                view = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
                digest.update(view)
                file.write(view)
                written(len(view))
        if file.tell() != len(header) + sum(t.nbytes for t in ordered):
            raise DynCompressError(f"{path} got another number of bytes than planned; report this")
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when all of it is on the disk, and else leaves nothing.

    Raises:
        DynCompressError: it cannot be written.
    """
    unfinished = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except OSError as error:
        hint = "; free some space and run it again: it goes on here" if error.errno == errno.ENOSPC else ""
        raise DynCompressError(f"cannot write {path}: {error.strerror or error}{hint}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file in one step. Raises DynCompressError when it cannot be written."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(tensors: Sequence[Planned]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
