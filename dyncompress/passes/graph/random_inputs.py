"""Inputs that look real enough to check a model on: valid token ids, masks with padding, varied magnitudes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...errors import RequestError
from .call_structure import nested_inputs
from .inputs import Inputs, batch_size, flat_inputs, split_inputs
from .meta import FixedInput, TensorInput, inputs_of
from .nodes import op_name
from .walk import uses

_KEEP_VALUES = {
    "view", "reshape", "flatten", "slice", "select", "squeeze", "unsqueeze", "expand", "transpose", "permute", "clone",
    "contiguous", "to", "_to_copy", "add", "sub",
}  # fmt: skip


def random_inputs(gm: fx.GraphModule, batch: int, *, shorter: bool = False) -> list[Any]:
    """The same flat inputs on every call, in the order of the graph's placeholders.

    Args:
        gm: a captured graph.
        batch: how many samples.
        shorter: one step less than at capture along the dims, batch aside, that may vary.
    """
    draw = torch.Generator().manual_seed(batch)
    floats = next((p.dtype for p in gm.parameters() if p.is_floating_point()), None)
    flat = []
    for spec, node in zip(inputs_of(gm), gm.graph.find_nodes(op="placeholder"), strict=True):
        if isinstance(spec, FixedInput):
            flat.append(spec.value)
            continue
        shape = [_size(spec, d, batch, shorter) for d in range(len(spec.shape))]
        dtype = spec.dtype
        if dtype.is_floating_point:
            flat.append(_magnitudes(shape, draw).to(floats or dtype))
        elif (count := _table_rows(gm, node)) is not None:
            flat.append(torch.randint(0, count, shape, generator=draw).to(dtype))
        else:
            flat.append(_padded(shape, draw).to(dtype))
    return flat


def given_inputs(gm: fx.GraphModule, inputs: Inputs, batch: int) -> list[Any]:
    """Flat inputs of `batch` samples from the user's, over again from the first where there are fewer.

    Raises:
        RequestError: the inputs do not fit the model, or hold no sample.
    """
    args, kwargs = split_inputs(pytree.tree_map_only(Tensor, Tensor.cpu, inputs))
    flat = flat_inputs(gm, args, kwargs)
    count = batch_size(gm, flat)
    if count == 0:
        raise RequestError("inputs= holds no samples to check on; give at least one")
    rows = torch.arange(batch) % count
    return [x[rows] if given.per_sample else x for given, x in zip(inputs_of(gm), flat, strict=True)]


def call_flat(function: Callable[..., Any], gm: fx.GraphModule, flat: Sequence[Any]) -> Any:
    """Calls `function` the way `gm` is called, from flat inputs."""
    args, kwargs = nested_inputs(gm.graph, flat)
    return function(*args, **kwargs)


def _size(spec: TensorInput, d: int, batch: int, shorter: bool) -> int:
    size = spec.shape[d]
    if d not in spec.dynamic:
        return size
    return batch if d == 0 else max(size - shorter, 1)


def _magnitudes(shape: list[int], draw: torch.Generator) -> Tensor:
    """Gaussian, faint to strong from sample to sample, so that not all are equally easy."""
    strength = torch.empty(shape[:1] + [1] * (len(shape) - 1)).uniform_(math.log(0.2), math.log(5), generator=draw)
    return torch.randn(shape, generator=draw) * strength.exp()


def _padded(shape: list[int], draw: torch.Generator) -> Tensor:
    """Ones, then zeros: a mask of sequences of different lengths, none of them empty or (from 2 steps on) whole."""
    if len(shape) < 2:
        return torch.ones(shape)
    lengths = torch.randint(1, max(shape[-1], 2), [*shape[:-1], 1], generator=draw)
    return (torch.arange(shape[-1]) < lengths).float()


def _table_rows(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """The rows of the smallest embedding that `node` is an index into; None where it is no index."""
    read = uses(node, lambda user: user.op == "call_function" and op_name(user) in _KEEP_VALUES)
    rows = (_embedding_rows(gm, user, index) for user, index in read)
    return min((count for count in rows if count is not None), default=None)


def _embedding_rows(gm: fx.GraphModule, user: fx.Node, index: fx.Node) -> int | None:
    if user.op == "call_module":
        module = gm.get_submodule(str(user.target))
        return module.num_embeddings if isinstance(module, nn.Embedding | nn.EmbeddingBag) else None
    if user.target is torch.ops.aten.embedding.default and user.args[1] is index:
        return int(user.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
    return None
