"""The tensors of a captured model: their names, what each is, and which are one and the same.

    "fc.weight": {"kind": "parameter"}, "head.weight": {"kind": "parameter", "same_as": "fc.weight"}

The file itself says shape and dtype. Optional entries: "requires_grad": false for a frozen parameter, "persistent":
false for a buffer outside the state dict, "order" for the dimension order in memory (channels last), "complex": true
for one stored as pairs of reals.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import DynCompressError, RequestError
from .graph_json import check_path

Table = dict[str, dict[str, Any]]


def _named_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor, bool | None]]:
    """Name, tensor and, for a buffer, whether it is persistent; in the order of the state dict."""
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter, None
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield prefix + name, buffer, name not in module._non_persistent_buffers_set


def describe_tensors(root: nn.Module) -> tuple[Table, dict[str, Tensor]]:
    """What every tensor is, and the tensors as they are, each once, by its first name."""
    table: Table = {}
    first: dict[str, Tensor] = {}
    first_name: dict[int, str] = {}
    for name, tensor, persistent in _named_tensors(root):
        entry: dict[str, Any] = {"kind": "parameter" if persistent is None else "buffer"}
        table[name] = entry
        if persistent is None and not tensor.requires_grad:
            entry["requires_grad"] = False
        if persistent is False:
            entry["persistent"] = False
        if id(tensor) in first_name:
            entry["same_as"] = first_name[id(tensor)]
        else:
            first_name[id(tensor)] = name
            first[name] = tensor
    return table, first


def encode_tensors(root: nn.Module) -> tuple[Table, dict[str, Tensor]]:
    """What every tensor is, and the tensors to store: on the CPU, contiguous, each once.

    Raises:
        DynCompressError: a tensor has no values (meta device) or is not dense (sparse, quantised, a subclass).
    """
    table, first = describe_tensors(root)
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in first.items():
        plain = _plain(name, tensor, table[name])
        storage = plain.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != plain.nbytes:
            plain = plain.clone()  # a slice or another view of what is stored already
        storages.add(plain.untyped_storage().data_ptr())
        stored[name] = plain
    return table, stored


def _plain(name: str, tensor: Tensor, entry: dict[str, Any]) -> Tensor:
    """The tensor's values as a contiguous real CPU tensor; notes in `entry` how to get the tensor back."""
    dense = tensor.layout is torch.strided and not tensor.is_quantized
    if not dense or type(tensor) not in (Tensor, nn.Parameter):
        raise DynCompressError(f"this model cannot be saved: {name} is not a plain dense tensor; convert it first")
    if tensor.device.type == "meta":
        raise DynCompressError(
            f"this model cannot be saved: {name} has no values (meta device); load its weights first"
        )
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    order = sorted(range(plain.dim()), key=plain.stride, reverse=True)
    if not plain.is_contiguous() and plain.permute(order).is_contiguous():
        entry["order"] = order
    if plain.is_complex():
        entry["complex"] = True
        plain = torch.view_as_real(plain)
    return plain.contiguous()


def assign_tensors(root: nn.Module, table: Table, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives the modules below `root`, built on the meta device, their tensors; returns these by name.

    Raises:
        RequestError: a tensor is missing, is not asked for, or has another shape than its module says.
    """
    expected = {name for name, entry in table.items() if "same_as" not in entry}
    if expected != set(stored):
        odd = sorted(expected ^ set(stored))
        raise RequestError(f"its list of tensors and its tensors differ: {', '.join(odd)[:200]}")
    made: dict[str, Tensor] = {}
    for name, entry in table.items():
        check_path(name)
        source = entry.get("same_as")
        made[name] = _typed(stored[name], entry) if source is None else made[source]
        _put(root, name, made[name], entry)
    for name, tensor, _ in _named_tensors(root):
        if name not in table:
            raise RequestError(f"tensor {name} {list(tensor.shape)} is missing")
    for module in root.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    return made


def _typed(data: Tensor, entry: dict[str, Any]) -> Tensor:
    data = torch.view_as_complex(data) if entry.get("complex") else data
    order = entry.get("order")
    if order is not None:
        inverse = sorted(range(len(order)), key=order.__getitem__)
        data = data.permute(order).contiguous().permute(inverse)
    if entry["kind"] == "parameter":
        return nn.Parameter(data, requires_grad=bool(entry.get("requires_grad", True)))
    return data


def _put(root: nn.Module, path: str, tensor: Tensor, entry: dict[str, Any]) -> None:
    parent, _, name = path.rpartition(".")
    holder = root.get_submodule(parent)
    parameter = entry["kind"] == "parameter"
    if type(holder) is not nn.Module:  # a constructed module knows its tensors; a container takes what comes
        known = (holder._parameters if parameter else holder._buffers).get(name)
        if known is None or known.shape != tensor.shape:
            asked = "none" if known is None else list(known.shape)
            raise RequestError(f"tensor {path} is {list(tensor.shape)} where its module expects {asked}")
    if parameter:
        holder.register_parameter(name, tensor)  # type: ignore[arg-type]
    else:
        holder.register_buffer(name, tensor, persistent=bool(entry.get("persistent", True)))
