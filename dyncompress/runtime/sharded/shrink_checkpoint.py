"""Shrinking a checkpoint that is larger than memory: planned on the meta device, then streamed tensor by tensor.

    source shard -> blocks of rows -> the plan's slices of them -> new shard

Nothing larger than a block of rows is held. Every shard appears whole under its name or not at all, and a journal
says which are done; so a run that was killed goes on at the next shard and ends with the same bytes.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

from ...errors import DynCompressError, RequestError
from ...passes.axes.axes import as_keep, infer_axes
from ...passes.graph.nodes import attribute
from ...passes.shrink.plan import Kept, Plan, plan_axes
from ...passes.shrink.shrink import shrink_axes
from ..files.checkpoint import check_loadable, describe
from ..files.model_folder import shard_name
from ..files.shards import BITS, DTYPES, Source
from ..files.tensor_table import describe_tensors
from .journal import Journal, check_free, finish, open_journal, replaceable
from .match_tensors import check_constants, match
from .shard_writer import Planned, pack, write_shard

MAX_SHARD_BYTES = 2 * 10**9
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def shrink_checkpoint(
    gm: fx.GraphModule,
    keep: Mapping[str, Tensor | list[int]],
    source: str | PathLike[str],
    out: str | PathLike[str],
    *,
    exact: bool = False,
    drop: Sequence[str] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Shrinks a checkpoint without loading it; `load(out)` gives what `shrink` of the loaded model would.

    Memory: a few blocks of 1 MiB (or of one row, where a row is larger), whatever the sizes of tensors and model.

    Args:
        gm: the model, captured on the meta device (`capture_empty`), in the dtypes of the source.
        keep, exact: as for `shrink`; but constants are not folded into biases, which needs the weights in memory.
        source: a safetensors file, or a folder with model.safetensors.index.json and shards, or with model.safetensors.
        out: a folder for the new shards (at most `max_shard_bytes` of tensors each, or one tensor), their index and the
            graph. The index comes last: a folder with it is whole.
        drop: tensors of the source that the model does not use, as names or patterns; they are left out.
        progress: a progress bar on standard error; None = where that is a terminal.
        resume: go on with the same unfinished run in `out`.
        overwrite: replace the model, or the unfinished run, in `out`.

    Returns:
        `out`.

    Raises:
        RequestError: as `shrink`; the source does not fit the model; `out` is taken; exact mode would have to fold.
        DynCompressError: the disk is full, or a file cannot be read or written; with resume, the call goes on there.
    """
    stored, folder = Source(Path(source)), Path(out)
    check_output(stored, folder, resume=resume, overwrite=overwrite)
    if max_shard_bytes < 1:
        raise RequestError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    work = _plan(gm, keep, stored, exact, drop)
    shards = pack(work.planned.values(), max_shard_bytes)
    journal = _open(folder, _request(work, shards), shards, resume, overwrite)
    _write(folder, work, shards, journal, progress)
    finish(journal, work.document, work.constants, shards)
    return folder


def check_output(source: Source, folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises RequestError when nothing may be written to the folder: it is taken, or it is the source's own."""
    if any(file.resolve().parent == folder.resolve() for file in source.files):
        raise RequestError(f"{folder} is the folder of the source: give another folder for the result")
    check_free(folder, resume=resume, overwrite=overwrite)


@dataclass(frozen=True)
class _Work:
    """What is to be written: tensors by new name (what comes out, from where, which slices of it) and constants."""

    source: Source
    document: dict[str, Any]
    planned: dict[str, Planned]
    origin: dict[str, str]
    kept: dict[str, Kept]
    constants: dict[str, Tensor]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The slice of a tensor, in blocks of rows."""
        kept = self.kept[name]
        for piece in self.source.pieces(self.origin[name], kept[0] if kept else None):
            block = piece.view(BITS[piece.dtype.itemsize])
            for dim, indices in enumerate(kept[1:], start=1):
                if indices is not None:
                    block = block.index_select(dim, indices)
            yield block


def _plan(
    gm: fx.GraphModule, keep: Mapping[str, Tensor | list[int]], source: Source, exact: bool, drop: Sequence[str]
) -> _Work:
    axes = infer_axes(gm)
    atoms = as_keep(axes, keep)
    origin = match(gm, source, drop)
    scheme, small = plan_axes(axes, atoms), shrink_axes(axes, atoms, exact=exact)
    if exact:
        check_constants(gm, source, origin, scheme)
    table, tensors = describe_tensors(small)
    streamed = {name: tensor for name, tensor in tensors.items() if name in origin}
    constants = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items() if name not in origin}
    document = describe(small, table, None)
    kept = _kept_by_name(gm, scheme, streamed)
    planned = {name: _planned(name, tensor, source, origin[name], kept[name]) for name, tensor in streamed.items()}
    check_loadable(small, document, {name: tensor.to("meta") for name, tensor in tensors.items()})
    return _Work(source, document, planned, origin, kept, constants)


def _kept_by_name(gm: fx.GraphModule, scheme: Plan, names: Mapping[str, Tensor]) -> dict[str, Kept]:
    """The slices of each tensor; the plan may know a tied one by another of its names."""
    by_tensor = {id(attribute(gm, name)): kept for name, kept in scheme.kept.items()}
    return {name: by_tensor.get(id(attribute(gm, name)), ()) for name in names}


def _planned(name: str, tensor: Tensor, source: Source, origin: str, kept: Kept) -> Planned:
    shape = list(source.tensors[origin].shape)
    for dim, indices in enumerate(kept):
        shape[dim] = shape[dim] if indices is None else len(indices)
    if shape != list(tensor.shape):
        raise DynCompressError(f"{name} would be {shape}, but the shrunk model has {list(tensor.shape)}; report this")
    return Planned(name, _DTYPE_NAMES[tensor.dtype], tuple(shape), tensor.numel() * tensor.element_size())


def _request(work: _Work, shards: Sequence[Sequence[Planned]]) -> str:
    """A digest of everything that the result depends on: the model, the slices, the shards, the source files."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in work.source.files]
    layout = [[tensor.name for tensor in shard] for shard in shards]
    digest = sha256(json.dumps([work.document, layout, files, work.origin]).encode())
    for name, kept in work.kept.items():
        for dim, indices in enumerate(kept):
            if indices is not None:
                digest.update(f"{name}:{dim}".encode())
                digest.update(indices.to(torch.int64).numpy().data)
    return digest.hexdigest()


def _open(folder: Path, request: str, shards: Sequence[Sequence[Planned]], resume: bool, overwrite: bool) -> Journal:
    """The journal, once it is sure that the disk has room for what is not done yet."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    needed = sum(_sizes(shards).values())
    free = shutil.disk_usage(existing).free + sum(path.stat().st_size for path in replaceable(folder))
    if free < needed:
        raise DynCompressError(
            f"{folder} needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB: free some space or give "
            "another folder"
        )
    return open_journal(folder, request, resume=resume, overwrite=overwrite)


def _write(
    folder: Path, work: _Work, shards: Sequence[Sequence[Planned]], journal: Journal, progress: bool | None
) -> None:
    """The shards that the journal does not name yet."""
    sizes = _sizes(shards)
    with tqdm(
        total=sum(sizes.values()), initial=sum(sizes[name] for name in journal.done), desc="writing shards",
        unit="B", unit_scale=True, file=sys.stderr, disable=None if progress is None else not progress,
    ) as bar:  # fmt: skip
        for name, tensors in zip(sizes, shards, strict=True):
            if name not in journal.done:
                journal.finished(name, write_shard(folder / name, tensors, work.pieces, bar.update))


def _sizes(shards: Sequence[Sequence[Planned]]) -> dict[str, int]:
    """Bytes of tensors in each shard, by file name."""
    return {shard_name(i, len(shards)): sum(tensor.nbytes for tensor in shard) for i, shard in enumerate(shards)}
