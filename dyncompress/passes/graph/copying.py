"""Deep copies of captured models, and the module of a graph, compiled when it is first called."""

import copy
import warnings
from collections.abc import Mapping
from threading import RLock
from typing import Any, ClassVar, TypeVar

from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule

from .module_tree import sharing
from .nodes import attribute

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


class LazyGraphModule(_LazyGraphModule):
    """A graph's module, whose Python code is written and compiled when it is first called or printed.

    Torch's own, for threads that share a model: writing marks the graph's nodes, so only one may write at a time.
    """

    _writing: ClassVar = RLock()

    def real_recompile(self) -> None:
        with self._writing:
            super().real_recompile()


def deep_copy(model: M, memo: dict[int, Any] | None = None) -> M:
    """copy.deepcopy of a captured model; `memo` maps the id of a tensor to what the copy holds in its place."""
    memo = {} if memo is None else memo
    _copy_layers(model, memo)
    copied = _deepcopy(model, memo)
    for path, module in model.named_modules():  # a GraphModule copies buffers without this mark
        copied.get_submodule(path)._non_persistent_buffers_set |= module._non_persistent_buffers_set
    return copied


def graph_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own that calls the modules, and reads the parameters, of `gm`."""
    copied = LazyGraphModule(sharing(gm), _deepcopy(gm.graph, {}))
    copied.training, copied.meta = gm.training, copy.deepcopy(gm.meta)
    return copied


def copy_with(gm: fx.GraphModule, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """A deep copy that holds other tensors, of any shape and device, for the named parameters and buffers."""
    memo: dict[int, Any] = {}
    for name, new in tensors.items():
        old = attribute(gm, name)
        memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    _copy_layers(gm, memo)
    copied = LazyGraphModule(nn.Module(), fx.Graph())
    copied.training, copied.meta = gm.training, copy.deepcopy(gm.meta, memo)
    copied._parameters.update(copy.deepcopy(gm._parameters, memo))
    copied._modules.update(copy.deepcopy(gm._modules, memo))
    copied._buffers.update(copy.deepcopy(gm._buffers, memo))
    copied._non_persistent_buffers_set |= gm._non_persistent_buffers_set
    copied._graph = _deepcopy(gm.graph, memo)
    copied._graph.owning_module = copied
    return copied


def _deepcopy(value: T, memo: dict[int, Any]) -> T:
    """torch 2.13 warns about its own leaf specification whenever a captured graph is copied; that one is silenced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        return copy.deepcopy(value, memo)


def _is_plain(module: nn.Module) -> bool:
    """Whether it is one of torch's own layers or a bare container: numbers, tensors and dicts of what it calls."""
    own = type(module).__module__.startswith("torch.nn.modules.")
    return own and not any(isinstance(value, (list, Tensor)) for value in vars(module).values())


def _copied(module: M, memo: dict[int, Any]) -> M:
    """What copy.deepcopy makes of a plain module, many times faster."""
    twin = type(module).__new__(type(module))
    vars(twin).update({k: v.copy() if isinstance(v, (dict, set)) else v for k, v in vars(module).items()})
    twin._parameters = {name: copy.deepcopy(p, memo) for name, p in module._parameters.items()}
    twin._modules = {name: copy.deepcopy(m, memo) for name, m in module._modules.items()}
    twin._buffers = {name: copy.deepcopy(b, memo) for name, b in module._buffers.items()}
    return twin


def _copy_layers(model: nn.Module, memo: dict[int, Any]) -> None:
    for module in reversed(list(model.modules())):  # children first
        if _is_plain(module):
            memo[id(module)] = _copied(module, memo)
