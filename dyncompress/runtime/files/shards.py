"""Reading the tensors of safetensors files piece by piece, with memory that does not depend on their size.

A file is an 8-byte length, a JSON header and the tensors' bytes, row-major. Rows are read with plain file reads into
small buffers: pages of a memory map would count as the process' memory for as long as the system has room for them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import DynCompressError, RequestError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PIECE_BYTES = 2**20  # read at once, unless a single row is larger; small enough for the cache of a processor

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# Rows are selected as whole numbers of the same width: every dtype can do that, and no bit changes.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype as safetensors spells it, its shape, its first byte and its length in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class Source:
    """The tensors of one safetensors file, or of a folder with an index and shards or a single model.safetensors.

    Raises:
        RequestError: nothing of the kind is there, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _files(path)
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            for name, stored in read_header(file).items():
                if name in self.tensors:
                    raise RequestError(f"{path}: {name} is both in {self.tensors[name].file.name} and in {file.name}")
                self.tensors[name] = stored
        _check_index(path, self.tensors)

    def pieces(self, name: str, rows: Tensor | None = None) -> Iterator[Tensor]:
        """The tensor as consecutive blocks of rows, each in memory of its own; a scalar as one row.

        Args:
            rows: ascending indices of the rows wanted; None = all.
        """
        for piece in _bits_of(self.tensors[name], rows):
            yield piece.view(DTYPES[self.tensors[name].dtype])

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are bit for bit alike."""
        a, b = self.tensors[one], self.tensors[other]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        pairs = zip(_bits_of(a, None), _bits_of(b, None), strict=True)
        return all(torch.equal(left, right) for left, right in pairs)


def read_tensor(stored: Stored) -> Tensor:
    """A whole tensor, in memory of its own. Raises DynCompressError when it cannot be read."""
    whole = torch.empty(stored.shape, dtype=BITS[DTYPES[stored.dtype].itemsize])
    if stored.nbytes:
        _fill(whole, stored.file, stored.begin)
    return whole.view(DTYPES[stored.dtype])


def _bits_of(stored: Stored, rows: Tensor | None) -> Iterator[Tensor]:
    """Blocks of the wanted rows as whole numbers. What lies between two wanted rows of one block is read along."""
    shape = stored.shape or (1,)
    if stored.nbytes == 0:
        return
    row_bytes = stored.nbytes // shape[0]
    kind = BITS[DTYPES[stored.dtype].itemsize]
    limit = max(1, PIECE_BYTES // row_bytes)
    for first, last, inside in _blocks(rows, shape[0], limit):
        block = torch.empty((last - first, *shape[1:]), dtype=kind)
        _fill(block, stored.file, stored.begin + first * row_bytes)
        yield block if inside is None else block.index_select(0, inside)


def _blocks(rows: Tensor | None, count: int, limit: int) -> Iterator[tuple[int, int, Tensor | None]]:
    """(first row, end, wanted rows counted from the first or None for all) of spans of at most `limit` rows."""
    if rows is None:
        for first in range(0, count, limit):
            yield first, min(count, first + limit), None
        return
    at = 0
    while at < len(rows):
        first = int(rows[at])
        end = int(torch.searchsorted(rows, first + limit))
        yield first, int(rows[end - 1]) + 1, rows[at:end] - first
        at = end


def _fill(block: Tensor, file: Path, begin: int) -> None:
    """Reads a contiguous tensor from byte `begin` of a file.

    Raises:
        DynCompressError: it cannot be read, or ends before.
    """
    view = block.reshape(-1).view(torch.uint8).numpy().data
    try:
        with file.open("rb", buffering=0) as opened:
            opened.seek(begin)
            while len(view) and (count := opened.readinto(view)):
                view = view[count:]
    except OSError as error:
        raise DynCompressError(f"cannot read {file}: {error.strerror or error}") from error
    if len(view):
        raise DynCompressError(f"{file} ended while it was read: another program changed it")


def read_header(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by name, in the order of the bytes.

    Raises:
        RequestError: the file is missing, damaged, or holds a dtype that PyTorch tensors here cannot have.
    """
    if not file.is_file():
        raise RequestError(f"there is no file {file}")
    try:
        with safe_open(file, framework="pt"):  # checks lengths and offsets; no tensor is touched
            pass
        with file.open("rb") as opened:
            start = 8 + int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(start - 8))
    except (OSError, SafetensorError, ValueError) as error:
        raise RequestError(f"{file} is no safetensors file, or cut short or damaged: {error}") from error
    header.pop("__metadata__", None)
    found = {name: _stored(file, name, entry, start) for name, entry in header.items()}
    return dict(sorted(found.items(), key=lambda item: item[1].begin))


def _stored(file: Path, name: str, entry: dict[str, Any], start: int) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise RequestError(f"{file}: {name} is {entry['dtype']}, which is none of {', '.join(DTYPES)}")
    begin, end = entry["data_offsets"]
    return Stored(file, entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise RequestError(f"there is no file or folder {path}")
    if (path / INDEX).is_file():
        return [path / name for name in dict.fromkeys(_weight_map(path).values())]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    raise RequestError(f"{path} holds neither {INDEX} nor {SINGLE}: give a folder of safetensors, or a file")


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{folder / INDEX} is damaged: it holds no weight_map") from error
    for file in names.values():
        if Path(file).name != file:
            raise RequestError(f"{folder / INDEX} names {file!r}, which is no plain file name")
    return names


def _check_index(path: Path, tensors: dict[str, Stored]) -> None:
    if not (path / INDEX).is_file():
        return
    for name, file in _weight_map(path).items():
        if name not in tensors or tensors[name].file.name != file:
            raise RequestError(f"{path / INDEX} says that {name} is in {file}, but it is not there")
