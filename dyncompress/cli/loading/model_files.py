"""Model files: what a file is, seen from its bytes and never from its name, and how each kind is read.

1. safetensors: a checkpoint of ours (it carries a graph) or a state dict;
2. a torch.export archive;
3. torch.save: a state dict, read as plain tensors, or a pickled module, which is unpickled only when allowed:
   unpickling runs code from the file.
"""

import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, fx, nn

from ...errors import RequestError

Kind = Literal["safetensors", "export", "torch"]
# Keys under which training scripts keep the weights, beside the optimizer and the epoch.
_NESTED_KEYS = ("state_dict", "model_state_dict", "model")


def kind_of(path: Path) -> Kind:
    """What the bytes of the file say it is.

    Raises RequestError for what is not there, is cut short, or is no model file.
    """
    if path.is_dir():
        raise RequestError(f"{path} is a directory: give the model file in it, or hf:{path} for a Hugging Face folder")
    if not path.is_file():
        raise RequestError(f"there is no file {path}: give a model file or zoo:NAME, timm:NAME, module:factory ...")
    with path.open("rb") as file:
        head = file.read(9)
    has_header = head[8:] == b"{"
    if has_header and int.from_bytes(head[:8], "little") + 8 <= path.stat().st_size:
        return "safetensors"  # asked first: its first bytes are a length, which may look like any other kind
    if head[:2] == b"PK":
        return _zip_kind(path)
    if head[:1] == b"\x80":
        return "torch"
    if has_header:
        raise _damaged(path, "its header is cut short")
    raise RequestError(
        f"{path} is not a model file: expected a dyncompress checkpoint, a torch.export archive, a state dict "
        "(torch.save or safetensors) or a pickled module"
    )


def _zip_kind(path: Path) -> Kind:
    if not zipfile.is_zipfile(path):
        raise _damaged(path, "the end of the zip file is missing")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inner = {name.partition("/")[2] for name in names}
    if "serialized_exported_program.json" in names:
        raise RequestError(f"{path} is a torch.export archive of an old torch: save it again with torch >= 2.12")
    if "constants.pkl" in inner:
        raise RequestError(f"{path} is TorchScript, which torch.export cannot capture: give the module it came from")
    if "archive_format" in inner:
        return "export"
    if "data.pkl" in inner:
        return "torch"
    raise RequestError(f"{path} is a zip file with neither a torch.export archive nor a state dict in it")


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The text that a safetensors file carries beside its tensors. Raises RequestError for a damaged file."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    try:
        return dict(json.loads(header).get("__metadata__", {}))
    except ValueError as error:
        raise _damaged(path, "its header is not JSON") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The state dict of a safetensors file. Raises RequestError for a damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def read_torch(path: Path, allow_pickle: bool) -> nn.Module | dict[str, Tensor]:
    """What torch.save wrote: a state dict, or with `allow_pickle` a whole module.

    Raises RequestError for a damaged file, for pickled objects that are not allowed or cannot be imported, and for
    anything that is neither.
    """
    with path.open("rb") as file:
        content = _torch_load(path, file, allow_pickle)
    if isinstance(content, nn.Module):
        return content
    state = _find_state_dict(content)
    if state is None:
        raise RequestError(f"{path} holds a {type(content).__name__}, not a state dict: save model.state_dict()")
    return state


def _find_state_dict(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, dict):
        return None
    for key in _NESTED_KEYS:
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    return {str(name): value for name, value in content.items()}


def _torch_load(path: Path, file: BinaryIO, allow_pickle: bool) -> Any:
    try:
        with _damage_explained(path):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise _pickle_refused(path, found.group(1) if found else "Python objects") from error
    file.seek(0)
    try:
        with _damage_explained(path):
            return torch.load(file, map_location="cpu", weights_only=False)
    except (AttributeError, ImportError) as error:
        raise RequestError(f"{path} needs code that cannot be imported ({error}): run where it can be") from error
    except pickle.UnpicklingError as error:
        raise _damaged(path, "it is no pickle of torch.save") from error


def read_export(path: Path, allow_pickle: bool) -> tuple[nn.Module, Any]:
    """The module of a torch.export archive and its example inputs: a tuple of arguments or a dict of keywords.

    torch rebuilds operators and sizes from text in the archive, so an archive deserves the trust of a program; its
    pickled parts are refused like those of any other file.
    """
    if not allow_pickle:
        _refuse_pickled_parts(path)
    with _damage_explained(path), path.open("rb") as file:
        program = torch.export.load(file)
    args, kwargs = program.example_inputs or ((), {})
    if bool(args) == bool(kwargs):
        raise RequestError(f"{path} must take either positional or keyword inputs, and keep an example of them")
    exported = program.module(check_guards=False)
    # A plain copy, because train() and eval() of an exported module raise.
    module = fx.GraphModule(exported, exported.graph)
    _check_any_batch(path, module, args, kwargs)
    return module, args or kwargs


def _refuse_pickled_parts(path: Path) -> None:
    with _damage_explained(path), zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            inner = name.partition("/")[2]
            if inner.startswith("data/") and inner.endswith("_config.json"):
                parts = json.loads(archive.read(name))["config"].values()
                if any(part["use_pickle"] for part in parts):
                    raise _pickle_refused(path, "tensor subclasses or custom objects")
            if inner.startswith("data/") and inner.endswith(".pt"):
                _torch_load(path, io.BytesIO(archive.read(name)), allow_pickle=False)


def _check_any_batch(path: Path, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """An archive exported for one batch size may still hold that size in its views."""

    def one_more(leaf: Any) -> Any:
        return torch.cat((leaf, leaf[:1])) if isinstance(leaf, Tensor) and leaf.dim() else leaf

    more_args, more_kwargs = torch.utils._pytree.tree_map(one_more, (args, kwargs))
    try:
        with torch.no_grad():
            module(*more_args, **more_kwargs)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"{path} works at one batch size only: export it with dynamic_shapes that name dimension 0 Dim.DYNAMIC"
        ) from error


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    with warnings.catch_warnings():
        # torch warns of pickle protocols and formats that it then reads, or that end in one of our errors.
        warnings.simplefilter("ignore", UserWarning)
        try:
            yield
        except (RuntimeError, EOFError, IndexError, KeyError, AssertionError, zipfile.BadZipFile) as error:
            raise _damaged(path, next(iter(str(error).splitlines()), type(error).__name__)) from error


def _damaged(path: Path, reason: str) -> RequestError:
    return RequestError(f"{path} is cut short or damaged ({reason}): copy or download it again")


def _pickle_refused(path: Path, what: str) -> RequestError:
    return RequestError(
        f"{path} holds pickled objects ({what}); unpickling runs code from the file: "
        "give --allow-pickle if you trust it, or save model.state_dict() and name --arch"
    )
