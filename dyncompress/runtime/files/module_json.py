"""The modules of a captured model as JSON: a class from a closed list and its constructor's arguments.

    {"path": "conv1", "type": "Conv2d", "args": {"in_channels": 3, ..}}

"Module" is a plain container. To let a checkpoint carry one more class, add a line to `MODULE_KINDS`: the class and the
attributes that are its constructor's arguments, or None for a class whose `spec()` returns {"type", "args"}.
"""

import inspect
from typing import Any

import torch
from torch import nn

from ...errors import DynCompressError, RequestError
from ...passes.modules.counted_norms import CountedGroupNorm, CountedLayerNorm, CountedRMSNorm
from ...passes.modules.exit_heads import HEADS
from ...passes.modules.ragged_recurrent import RaggedRecurrent
from .graph_json import check_path
from .json_values import decode, encode
from .tensor_file import first_line

_CONV = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias", "padding_mode",
)  # fmt: skip
_CONV_TRANSPOSE = (*_CONV, "output_padding")
_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
_EMBEDDING = (
    "num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse",
)  # fmt: skip
# torch 2.13 gave these two a bias argument.
_BATCH_NORM, _GROUP_NORM = (
    names + (("bias",) if "bias" in inspect.signature(kind).parameters else ())
    for kind, names in (
        (nn.BatchNorm1d, ("num_features", "eps", "momentum", "affine", "track_running_stats")),
        (nn.GroupNorm, ("num_groups", "num_channels", "eps", "affine")),
    )
)
_DROPOUT = ("p", "inplace")

MODULE_KINDS: dict[str, tuple[type[nn.Module], tuple[str, ...] | None]] = {
    "Module": (nn.Module, ()),
    "Linear": (nn.Linear, ("in_features", "out_features", "bias")),
    "Conv1d": (nn.Conv1d, _CONV),
    "Conv2d": (nn.Conv2d, _CONV),
    "Conv3d": (nn.Conv3d, _CONV),
    "ConvTranspose1d": (nn.ConvTranspose1d, _CONV_TRANSPOSE),
    "ConvTranspose2d": (nn.ConvTranspose2d, _CONV_TRANSPOSE),
    "ConvTranspose3d": (nn.ConvTranspose3d, _CONV_TRANSPOSE),
    "Embedding": (nn.Embedding, _EMBEDDING),
    "BatchNorm1d": (nn.BatchNorm1d, _BATCH_NORM),
    "BatchNorm2d": (nn.BatchNorm2d, _BATCH_NORM),
    "BatchNorm3d": (nn.BatchNorm3d, _BATCH_NORM),
    "LayerNorm": (nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine", "bias")),
    "GroupNorm": (nn.GroupNorm, _GROUP_NORM),
    "RMSNorm": (nn.RMSNorm, ("normalized_shape", "eps", "elementwise_affine")),
    "PReLU": (nn.PReLU, ("num_parameters",)),
    "LSTM": (nn.LSTM, (*_RECURRENT, "proj_size")),
    "GRU": (nn.GRU, _RECURRENT),
    "RNN": (nn.RNN, (*_RECURRENT, "nonlinearity")),
    "Dropout": (nn.Dropout, _DROPOUT),
    "Dropout1d": (nn.Dropout1d, _DROPOUT),
    "Dropout2d": (nn.Dropout2d, _DROPOUT),
    "Dropout3d": (nn.Dropout3d, _DROPOUT),
    "AlphaDropout": (nn.AlphaDropout, _DROPOUT),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout, _DROPOUT),
    "RaggedRecurrent": (RaggedRecurrent, None),
    "CountedLayerNorm": (CountedLayerNorm, None),
    "CountedRMSNorm": (CountedRMSNorm, None),
    "CountedGroupNorm": (CountedGroupNorm, None),
    **{name: (kind, None) for name, kind in HEADS.items()},
}
_NAMES = {kind: name for name, (kind, _) in MODULE_KINDS.items()}


def encode_modules(root: nn.Module) -> list[dict[str, Any]]:
    """The modules below `root`, parents before children; a module met again under a second path refers to the first.

    Raises:
        DynCompressError: a module is of a class that is not in `MODULE_KINDS`.
    """
    entries: list[dict[str, Any]] = []
    first_path: dict[nn.Module, str] = {}

    def visit_children(module: nn.Module, prefix: str) -> None:
        for name, child in module._modules.items():
            if child is not None:
                visit(child, prefix + name)

    def visit(module: nn.Module, path: str) -> None:
        if module in first_path:
            entries.append({"path": path, "same_as": first_path[module]})
            return
        first_path[module] = path
        entry = _encode_module(module, path)
        entries.append(entry)
        if MODULE_KINDS[entry["type"]][1] is not None:  # our own classes make what is inside them
            visit_children(module, f"{path}.")

    visit_children(root, "")
    return entries


def _encode_module(module: nn.Module, path: str) -> dict[str, Any]:
    name = _NAMES.get(type(module))
    if name is None:
        raise DynCompressError(
            f"this model cannot be saved: module {path} is a {type(module).__name__}, which is outside the classes a "
            "checkpoint may carry"
        )
    attributes = MODULE_KINDS[name][1]
    if attributes is None:
        args = module.spec()["args"]  # type: ignore[operator]
    else:
        args = {attribute: _setting(module, attribute) for attribute in attributes}
    where = f"this model cannot be saved: module {path}"
    return {"path": path, "type": name, "args": {key: encode(value, where) for key, value in args.items()}}


def _setting(module: nn.Module, attribute: str) -> Any:
    value = getattr(module, attribute)
    if attribute == "bias" and not isinstance(value, bool):
        return value is not None
    return value


def decode_modules(entries: list[dict[str, Any]], tensor_count: int) -> nn.Module:
    """A root with the modules that `encode_modules` wrote, their tensors on the meta device.

    Args:
        tensor_count: tensors in the file, which bounds the layers of a recurrent module.

    Raises:
        RequestError: a module is not one that `encode_modules` writes.
    """
    root = nn.Module()
    for entry in entries:
        path = entry["path"]
        check_path(path)
        if "same_as" in entry:
            module = root.get_submodule(entry["same_as"])
        else:
            module = _decode_module(path, entry["type"], entry["args"], tensor_count)
        parent, _, name = path.rpartition(".")
        root.get_submodule(parent).add_module(name, module)
    return root


def _decode_module(path: str, name: str, settings: dict[str, Any], tensor_count: int) -> nn.Module:
    if name not in MODULE_KINDS:
        raise RequestError(
            f"module {path} is a {str(name)[:60]!r}, which is outside the classes a checkpoint may carry"
        )
    kind, attributes = MODULE_KINDS[name]
    args = {key: decode(value) for key, value in settings.items()}
    if attributes is not None and set(args) != set(attributes):
        raise RequestError(f"module {path} is a {name} with the arguments {', '.join(args)[:200]}")
    if args.get("num_layers", 0) > tensor_count:
        raise RequestError(f"module {path} has {args['num_layers']} layers but the file has {tensor_count} tensors")
    try:
        with torch.device("meta"):
            return kind(**args)
    except Exception as error:  # constructors check their arguments with any of a dozen exceptions
        raise RequestError(
            f"module {path} cannot be a {name} with the arguments of the file: {first_line(error)}"
        ) from error
