"""Deep copies of captured models."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from .typing import attribute

M = TypeVar("M", bound=nn.Module)


def deep_copy(model: M, memo: dict[int, Any] | None = None) -> M:
    """copy.deepcopy of a captured model; `memo` maps the id of a tensor to what the copy holds in its place.

    torch 2.13 warns about its own leaf specification whenever a captured graph is copied; that one is silenced.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        copied = copy.deepcopy(model, {} if memo is None else memo)
    for path, module in model.named_modules():  # a GraphModule copies buffers without this mark
        copied.get_submodule(path)._non_persistent_buffers_set |= module._non_persistent_buffers_set
    return copied


def copy_with(model: M, tensors: Mapping[str, Tensor]) -> M:
    """A deep copy that holds other tensors, of any shape and device, for the named parameters and buffers."""
    memo: dict[int, Any] = {}
    for name, new in tensors.items():
        old = attribute(model, name)
        memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return deep_copy(model, memo)
