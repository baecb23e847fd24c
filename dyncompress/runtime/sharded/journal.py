"""A model in a folder: safetensors shards under the user's names, their index, and the graph beside them.

model-00001-of-00002.safetensors ..   plain shards, as other programs read them
graph.dyn                             what `save` writes (graph, modules, constants), with the shards' SHA-256
model.safetensors.index.json          which tensor is in which shard; last, so that a folder with it is whole
unfinished.json                       while it is being written: for which request, and which shards are done
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import RequestError
from ..files.model_folder import GRAPH, JOURNAL, SHARD, shard_name
from ..files.shards import INDEX, SINGLE
from ..files.tensor_file import write_file
from .shard_writer import TEMPORARY, Planned, sync_folder, write_json


@dataclass
class Journal:
    """What is done in a folder: the SHA-256 of every finished shard, by file name, of the run with this `request`."""

    folder: Path
    request: str
    done: dict[str, str] = field(default_factory=dict)

    def finished(self, shard: str, digest: str) -> None:
        """Notes a shard that is on the disk."""
        self.done[shard] = digest
        self.write()

    def write(self) -> None:
        """Puts the journal on the disk. Raises DynCompressError when that fails."""
        write_json(self.folder / JOURNAL, {"request": self.request, "done": self.done})


def check_free(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises RequestError when nothing may be written to the folder.

    Args:
        resume: an unfinished run there may go on.
        overwrite: what is there may be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file: give a folder")
    if not folder.is_dir() or overwrite or (resume and (folder / JOURNAL).is_file()):
        return
    if (folder / JOURNAL).is_file():
        raise RequestError(f"{folder} holds an unfinished run: resume it, overwrite it or give another folder")
    if (folder / INDEX).is_file() or any(folder.glob("*.safetensors")):
        raise RequestError(f"{folder} holds a model already: give another folder, or overwrite it")


def open_journal(folder: Path, request: str, *, resume: bool, overwrite: bool) -> Journal:
    """The journal of this request, begun or gone on with; what another run left is removed where `overwrite` says so.

    Raises:
        RequestError: the folder holds an unfinished run of another request.
    """
    old = _read_journal(folder)
    if resume and old is not None and old.request == request:
        journal = old
        journal.done = {name: digest for name, digest in old.done.items() if (folder / name).is_file()}
    elif old is not None and not overwrite:
        raise RequestError(
            f"{folder} holds an unfinished run of another model, source or choice: overwrite it or give another folder"
        )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)  # first: without it what is left is no model
        journal = Journal(folder, request)
        journal.write()
    for path in replaceable(folder):
        if path.name not in (*journal.done, JOURNAL):
            path.unlink()
    return journal


def replaceable(folder: Path) -> list[Path]:
    """The files in a folder that a run there replaces."""
    if not folder.is_dir():
        return []
    shards = [path for path in folder.iterdir() if SHARD.fullmatch(path.name)]
    named = [folder / name for name in (INDEX, GRAPH, SINGLE, JOURNAL)]
    return [path for path in [*named, *shards, *folder.glob(TEMPORARY)] if path.is_file()]


def _read_journal(folder: Path) -> Journal | None:
    path = folder / JOURNAL
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Journal(folder, str(content["request"]), {str(k): str(v) for k, v in content["done"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path} is damaged: overwrite the folder or give another") from error


def finish(
    journal: Journal, document: dict[str, Any], constants: Mapping[str, Tensor], shards: Sequence[Sequence[Planned]]
) -> None:
    """Writes the graph, then the index, and takes the journal away: from here on the folder is a model."""
    folder = journal.folder
    names = [shard_name(number, len(shards)) for number in range(len(shards))]
    write_file(folder / GRAPH, {**document, "shards": {name: journal.done[name] for name in names}}, constants)
    where = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    (folder / JOURNAL).unlink(missing_ok=True)
    sync_folder(folder)
