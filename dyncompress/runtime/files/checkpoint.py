"""Checkpoints: a captured or dynamic model in one file, rebuilt without its source code and without running any.

The file is safetensors: the tensors under the user's own names and, in the header, the graph, the modules and the
call structure as JSON. Loading looks every operator and class up in a closed list (`targets`, `module_json`); a file
from a stranger is refused, or computes: wrong numbers at worst, or too many.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from ...errors import DynCompressError, RequestError
from ...passes.graph.meta import info_of, plain_meta, read_meta
from ..predict.dynamic import DynamicModel
from ..predict.policy import ExitPolicy, OperatingPolicy
from .call_json import check_identifier, encode_call, set_call
from .graph_json import decode_nodes, encode_nodes
from .json_values import decode, encode
from .model_folder import GRAPH, is_model_folder, read_folder
from .module_json import decode_modules, encode_modules
from .tensor_file import check_destination, first_line, read_file, read_model, write_file
from .tensor_table import Table, assign_tensors, encode_tensors


def save(
    model: nn.Module, path: str | PathLike[str], *, info: dict[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Writes a captured model (`fx.GraphModule`) or a `DynamicModel` to one file.

    Args:
        path: conventionally ending in ``.dyn.safetensors``.
        info: anything of numbers, text, lists and dicts, such as accuracies and the resolved recipe; it comes back
            with the model (`info_of`). By default what the model carries already, the reports of what was done to it.
        overwrite: whether a file at `path` may be replaced.

    Raises:
        RequestError: the path is taken or impossible, `info` holds something else, or the model was not captured.
        DynCompressError: the model holds something a checkpoint cannot carry, or the file cannot be written.
    """
    path = Path(path)
    check_destination(path, overwrite)
    table, tensors = encode_tensors(_graph_module(model))
    document = describe(model, table, info)
    check_loadable(_graph_module(model), document, tensors)
    write_file(path, document, tensors)


def load(path: str | PathLike[str]) -> nn.Module:
    """The model that `save` wrote, or `shrink_checkpoint` in a folder: same outputs, same state dict, same train or
    eval mode, on the CPU.

    An output that was a dataclass comes back as a plain dict of its fields, a named tuple as a tuple.

    Raises:
        RequestError: there is no such file, or it is not, or no longer, a checkpoint.
    """
    document, tensors = read_folder(Path(path)) if is_model_folder(Path(path)) else read_file(Path(path))
    with _malformed(path):
        return _build(document, tensors)


def read_info(path: str | PathLike[str]) -> dict[str, Any]:
    """The `info` a checkpoint was saved with, read from the header alone; {} where none was given.

    Raises:
        RequestError: as `load`; the tensors are neither read nor checked.
    """
    document = read_model(Path(path) / GRAPH if is_model_folder(Path(path)) else Path(path))
    with _malformed(path):
        return dict(decode(document["meta"]).get("info", {}))


@contextmanager
def _malformed(path: str | PathLike[str]) -> Iterator[None]:
    """A hostile document can go wrong in any way; none may reach the user as anything but one line."""
    try:
        yield
    except Exception as error:
        reason = first_line(error)[:500]
        if not isinstance(error, RequestError):
            reason = f"malformed description ({type(error).__name__}: {reason})"
        raise RequestError(f"{path} is not a valid checkpoint: {reason}") from error


def describe(model: nn.Module, table: Table, info: dict[str, Any] | None) -> dict[str, Any]:
    """The document of a model whose tensors `table` describes.

    Raises:
        DynCompressError, RequestError: as `save`.
    """
    gm = _graph_module(model)
    opposite = [path for path, module in gm.named_modules() if module.training != model.training]
    document = {
        "kind": "dynamic" if isinstance(model, DynamicModel) else "graph",
        "class_name": gm.__class__.__name__,
        "call": encode_call(gm.graph),
        "nodes": encode_nodes(gm.graph),
        "modules": encode_modules(gm),
        "tensors": table,
        "training": model.training,
        "opposite_mode": opposite,
        "meta": _encode_meta(gm, info),
    }
    if isinstance(model, DynamicModel):
        document["policy"] = encode(model.policy.to_dict(), "the exit policy")
        rows = [{**asdict(row), "policy": row.policy.to_dict()} for row in model.table]
        document["table"] = encode(rows, "the table of budgets")
    return document


def _encode_meta(gm: fx.GraphModule, info: dict[str, Any] | None) -> Any:
    meta = encode(plain_meta(gm), "this model cannot be saved: its meta")
    if info is not None and not isinstance(info, dict):
        raise RequestError(f"info must be a dict, got {type(info).__name__}")
    carried = info_of(gm) if info is None else info
    if not carried:
        return meta
    try:
        meta["dict"]["info"] = encode(carried, "info")
    except DynCompressError as error:
        raise RequestError(f"{error}: give plain numbers, text, lists and dicts") from error
    return meta


def check_loadable(gm: fx.GraphModule, document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """What is written must come back; better to learn that it does not before the model is gone.

    Raises:
        DynCompressError: it does not.
    """
    try:
        rebuilt = _graph_module(_build(json.loads(json.dumps(document)), tensors))
    except Exception as error:
        raise DynCompressError(f"this model cannot be saved: {first_line(error)}") from error
    if str(rebuilt.graph) != str(gm.graph):
        raise DynCompressError("this model cannot be saved: its graph does not survive the file; report this")


def _build(document: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    root = decode_modules(document["modules"], len(tensors))
    named = assign_tensors(root, document["tensors"], tensors)
    layers = {path for path, m in root.named_modules(remove_duplicate=False) if type(m) is not nn.Module}
    graph = decode_nodes(document["nodes"], layers, named)
    set_call(graph, document["call"])
    check_identifier(document["class_name"])
    gm = fx.GraphModule(root, graph, class_name=document["class_name"])
    # The constructor keeps only what the graph uses, in that order; the model had its own.
    gm._modules, gm._parameters, gm._buffers = root._modules, root._parameters, root._buffers
    gm._non_persistent_buffers_set = root._non_persistent_buffers_set
    read_meta(gm, decode(document["meta"]))
    model = _dynamic(gm, document) if document["kind"] == "dynamic" else gm
    _set_modes(model, gm, document)
    return model


def _set_modes(model: nn.Module, gm: fx.GraphModule, document: dict[str, Any]) -> None:
    training = bool(document["training"])
    for module in model.modules():
        module.training = training
    for path in document["opposite_mode"]:
        gm.get_submodule(path).training = not training


def _graph_module(model: nn.Module) -> fx.GraphModule:
    gm = model.trunk if isinstance(model, DynamicModel) else model
    if not isinstance(gm, fx.GraphModule):
        raise RequestError(
            f"a checkpoint holds a captured or dynamic model, not a {type(model).__name__}: "
            "save dyncompress.capture(model, example_inputs)"
        )
    return gm


def _dynamic(gm: fx.GraphModule, document: dict[str, Any]) -> DynamicModel:
    rows = decode(document["table"]) if "table" in document else []  # files of before there were tables
    table = [
        OperatingPolicy(float(row["mean_macs"]), float(row["accuracy"]), ExitPolicy.from_dict(row["policy"]))
        for row in rows
    ]
    return DynamicModel(gm, ExitPolicy.from_dict(decode(document["policy"])), table)
