"""One safetensors file with a JSON document beside its tensors: written whole or not at all, checked when read.

The document stands under the key "dyncompress" of the file's metadata:

    {"version": 1, "sha256": "..", "model": {..}}

The digest covers the model's JSON text and every tensor's name, dtype, shape and bytes.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import DynCompressError, RequestError

VERSION = 1
_KEY = "dyncompress"


def check_destination(path: Path, overwrite: bool) -> None:
    """Raises RequestError when a file cannot or must not be written at `path`."""
    if os.path.isdir(path):
        raise RequestError(f"{path} is a directory: give the name of a file in it")
    if not os.path.isdir(path.parent):
        raise RequestError(f"the directory {path.parent} does not exist: create it first")
    if os.path.lexists(path) and not overwrite:
        raise RequestError(f"{path} exists: give another name, or overwrite=True to replace it")


def write_file(path: Path, model: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes the file, or leaves what was there.

    Raises:
        DynCompressError: the file cannot be written (disk full, no permission).
    """
    text = _dump({"version": VERSION, "sha256": _digest(model, tensors), "model": model})
    # In the same folder, so that the last step is a rename, which a crash cannot interrupt.
    unfinished = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # what the user's umask gives; the writer may make its file private
        save_file(dict(tensors), unfinished, metadata={_KEY: text})
        unfinished.chmod(mode)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, ValueError, SafetensorError) as error:
        raise DynCompressError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model's document and the tensors, in memory of their own.

    Raises:
        RequestError: there is no such file, it is no checkpoint, or its contents do not match its digest.
    """
    document = _read_document(path)
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned because the tensors of an open file are views of it, which another program may truncate.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        digest = _digest(document["model"], tensors)
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from error
    if digest != document["sha256"]:
        raise RequestError(f"{path} is damaged: its contents do not match its SHA-256; copy or write it again")
    return document["model"], tensors


def read_model(path: Path) -> dict[str, Any]:
    """The model's document alone, without reading or checking the tensors. Raises RequestError as `read_file`."""
    model: dict[str, Any] = _read_document(path)["model"]
    return model


def _read_document(path: Path) -> dict[str, Any]:
    if os.path.isdir(path):
        raise RequestError(f"{path} is a directory, not a checkpoint file")
    if not os.path.isfile(path):
        raise RequestError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from error
    if _KEY not in metadata:
        raise RequestError(f"{path} holds tensors but no model: give a file that dyncompress.save wrote")
    try:
        document = json.loads(metadata[_KEY], parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is damaged: its description of the model is not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("version") != VERSION:
        found = document.get("version") if isinstance(document, dict) else None
        raise RequestError(
            f"{path} has checkpoint format {str(found)[:20]}; this dyncompress reads format {VERSION}: upgrade it"
        )
    if not isinstance(document.get("model"), dict) or "sha256" not in document:
        raise RequestError(f"{path} is damaged: its description of the model is incomplete")
    return document


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _dump(document: Any) -> str:
    return json.dumps(document, separators=(",", ":"), allow_nan=False)


def _digest(model: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(_dump(model).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unreadable(path: Path, error: Exception) -> RequestError:
    return RequestError(f"{path} is not a readable checkpoint, or is cut short or damaged: {first_line(error)}")


def first_line(error: Exception) -> str:
    """The error's message without the traces and hints that follow it."""
    return next(iter(str(error).splitlines()), type(error).__name__)
