"""How an operator call is written as a standard module: one small builder per operator family.

A builder reads everything from the call itself (strides, eps, groups), so that any subclass or wrapper of a standard
layer becomes the plain layer. It returns None where the call is not what the plain layer computes.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from ..graph.nodes import bound_args
from . import opaque_recurrent as recurrent  # registers the opaque operator

aten = torch.ops.aten


@dataclass
class Built:
    """A module without its tensors, the live inputs of its call and, for several outputs, how users are rewired."""

    module: nn.Module
    inputs: tuple[Any, ...]
    reshape_output: Callable[[fx.Graph, fx.Node, fx.Node], None] | None = None


Builder = Callable[[fx.Node, nn.Module, dict[str, int]], Built | None]


def _source(arg: Any) -> int | None:
    return arg.meta.get("source") if isinstance(arg, fx.Node) else None


def _named(own: dict[str, int], **wanted: Any) -> bool:
    """Whether the module's tensors are exactly the call's, under the standard names."""
    return own == {name: _source(arg) for name, arg in wanted.items() if arg is not None}


def _meta(kind: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """A module of this kind on the meta device."""
    module: nn.Module = _uninitialised(kind)(*args, device="meta", **kwargs)
    module.__class__ = kind
    return module


@cache
def _uninitialised(kind: Any) -> Any:
    """`kind` without drawing initial weights, which takes time on the meta device too, nor looking for tensors and
    modules among the numbers it is given."""

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        setter = nn.Module if isinstance(value, torch.Tensor | nn.Module) else object
        setter.__setattr__(self, name, value)

    return type(kind.__name__, (kind,), {"reset_parameters": lambda self: None, "__setattr__": set_attribute})


def _pair(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * n if len(values) == 1 else values


def _conv(kind: type[nn.Module], dims: int) -> Builder:
    def build(node: fx.Node, _: nn.Module, own: dict[str, int]) -> Built | None:
        a = bound_args(node)
        if not _named(own, weight=a["weight"], bias=a["bias"]):
            return None
        out, per_group, *kernel = a["weight"].meta["val"].shape
        settings: dict[str, Any] = {
            "stride": _pair(a["stride"], dims),
            "padding": a["padding"] if isinstance(a["padding"], str) else _pair(a["padding"], dims),
            "dilation": _pair(a["dilation"], dims),
            "groups": a["groups"],
            "bias": a["bias"] is not None,
        }
        return Built(_meta(kind, per_group * a["groups"], out, tuple(kernel), **settings), (a["input"],))

    return build


def _conv_transpose(kind: type[nn.Module], dims: int) -> Builder:
    def build(node: fx.Node, _: nn.Module, own: dict[str, int]) -> Built | None:
        a = bound_args(node)
        if not _named(own, weight=a["weight"], bias=a["bias"]):
            return None
        inp, per_group, *kernel = a["weight"].meta["val"].shape
        settings: dict[str, Any] = {
            key: _pair(a[key], dims) for key in ("stride", "padding", "output_padding", "dilation")
        }
        settings |= {"groups": a["groups"], "bias": a["bias"] is not None}
        return Built(_meta(kind, inp, per_group * a["groups"], tuple(kernel), **settings), (a["input"],))

    return build


def _linear(node: fx.Node, _: nn.Module, own: dict[str, int]) -> Built | None:
    a = bound_args(node)
    if not _named(own, weight=a["weight"], bias=a["bias"]):
        return None
    out, inp = a["weight"].meta["val"].shape
    return Built(_meta(nn.Linear, inp, out, bias=a["bias"] is not None), (a["input"],))


def _embedding(node: fx.Node, _: nn.Module, own: dict[str, int]) -> Built | None:
    a = bound_args(node)
    if not _named(own, weight=a["weight"]) or a["sparse"] or a["scale_grad_by_freq"]:
        return None
    count, dim = a["weight"].meta["val"].shape
    padding = a["padding_idx"] if a["padding_idx"] >= 0 else None
    return Built(_meta(nn.Embedding, count, dim, padding_idx=padding), (a["indices"],))


_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _batch_norm(node: fx.Node, original: nn.Module, own: dict[str, int]) -> Built | None:
    a = bound_args(node)
    named = {k: a[k] for k in ("weight", "bias", "running_mean", "running_var")}
    if not isinstance(original, nn.modules.batchnorm._BatchNorm) or not _named(own, **named):
        return None  # a frozen batch norm is no BatchNorm: train() must not wake it
    kind = _BATCH_NORMS[len(a["input"].meta["val"].shape)]
    if (a["weight"] is None) != (a["bias"] is None):
        return None
    settings = {"affine": a["weight"] is not None, "track_running_stats": a["running_mean"] is not None}
    return Built(_meta(kind, original.num_features, a["eps"], original.momentum, **settings), (a["input"],))


def _layer_norm(node: fx.Node, _: nn.Module, own: dict[str, int]) -> Built | None:
    a = bound_args(node)
    if not _named(own, weight=a["weight"], bias=a["bias"]):
        return None
    shape, affine = tuple(a["normalized_shape"]), a["weight"] is not None
    module = _meta(nn.LayerNorm, shape, a["eps"], elementwise_affine=affine, bias=a["bias"] is not None)
    return Built(module, (a["input"],))


def _group_norm(node: fx.Node, _: nn.Module, own: dict[str, int]) -> Built | None:
    a = bound_args(node)
    if not _named(own, weight=a["weight"], bias=a["bias"]) or a["weight"] is None or a["bias"] is None:
        return None
    channels = a["input"].meta["val"].shape[1]
    return Built(_meta(nn.GroupNorm, a["num_groups"], channels, a["eps"]), (a["input"],))


def _rms_norm(node: fx.Node, _: nn.Module, own: dict[str, int]) -> Built | None:
    a = bound_args(node)
    if not _named(own, weight=a["weight"]) or a["weight"] is None:
        return None
    return Built(_meta(nn.RMSNorm, tuple(a["normalized_shape"]), a["eps"]), (a["input"],))


def _prelu(node: fx.Node, original: nn.Module, own: dict[str, int]) -> Built | None:
    a = bound_args(node)
    if not _named(own, weight=a["weight"]):
        return None
    return Built(_meta(nn.PReLU, a["weight"].meta["val"].shape[0]), (a["self"],))


def _recurrent(node: fx.Node, original: nn.Module, own: dict[str, int]) -> Built | None:
    if not isinstance(original, nn.RNNBase):
        return None
    o = original
    settings: dict[str, Any] = {
        "num_layers": o.num_layers, "bias": o.bias, "batch_first": o.batch_first,
        "dropout": o.dropout, "bidirectional": o.bidirectional,
    }  # fmt: skip
    kind: type[nn.RNNBase] = next(k for k in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(o, k))
    settings |= {"proj_size": o.proj_size} if kind is nn.LSTM else {}
    settings |= {"nonlinearity": o.nonlinearity} if isinstance(o, nn.RNN) else {}
    x, states = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    hx = (tuple(states) if kind is nn.LSTM else states[0]) if states else None
    inputs = (x,) if hx is None else (x, hx)
    return Built(_meta(kind, o.input_size, o.hidden_size, **settings), inputs, _unpack_state)


def _unpack_state(graph: fx.Graph, node: fx.Node, call: fx.Node) -> None:
    """The opaque call returns [y, h(, c)]; the module returns (y, h) or (y, (h, c))."""
    y, *state = node.meta["val"]
    call.meta["val"] = (y, state[0]) if len(state) == 1 else (y, tuple(state))
    for user in list(node.users):
        index = int(user.args[1])  # type: ignore[arg-type]
        with graph.inserting_before(user):
            source = call
            if index and len(state) == 2:
                source = _getitem(graph, call, 1, tuple(state))
            item = _getitem(graph, source, min(index, 1) if source is call else index - 1, user.meta["val"])
        user.replace_all_uses_with(item)
        graph.erase_node(user)
    graph.erase_node(node)


def _getitem(graph: fx.Graph, source: fx.Node, index: int, val: Any) -> fx.Node:
    item = graph.call_function(operator.getitem, (source, index))
    item.meta = {**source.meta, "val": val}
    return item


MODULE_BUILDERS: dict[Any, Builder] = {
    aten.conv1d.default: _conv(nn.Conv1d, 1),
    aten.conv2d.default: _conv(nn.Conv2d, 2),
    aten.conv3d.default: _conv(nn.Conv3d, 3),
    aten.conv1d.padding: _conv(nn.Conv1d, 1),
    aten.conv2d.padding: _conv(nn.Conv2d, 2),
    aten.conv3d.padding: _conv(nn.Conv3d, 3),
    aten.conv_transpose1d.default: _conv_transpose(nn.ConvTranspose1d, 1),
    aten.conv_transpose2d.input: _conv_transpose(nn.ConvTranspose2d, 2),
    aten.conv_transpose3d.input: _conv_transpose(nn.ConvTranspose3d, 3),
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.group_norm.default: _group_norm,
    aten.rms_norm.default: _rms_norm,
    aten.prelu.default: _prelu,
    recurrent.recurrent._opoverload: _recurrent,
}
