"""A batch that grows as the model shrinks: memory that is freed takes more samples (Lym et al., SC 2019).

What autograd keeps for the backward pass of B samples is fixed + B * m bytes: m is measured, by calls with two batch
sizes. For a model that had m_0 and now has m, a batch of b instead of b_0 needs no more if b * m <= b_0 * m_0.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ...passes.graph.inputs import split_inputs
from .batches import LabelledData, device_of_model, examples_of, to_device

_SAMPLES = (2, 4)  # a batch norm cannot train on one
_GRAIN = 4  # batches grow by quarters of the first


def bytes_per_sample(model: nn.Module, data: LabelledData, autocast: AbstractContextManager[Any]) -> int:
    """Bytes that a training step keeps for each sample between its forward and its backward pass.

    The model is called in the modes it has; its buffers stay as they are. Of the loss, which is not called, one copy of
    the model's output is counted, at least in float32: what cross-entropy keeps.

    Raises:
        RequestError: no data, or it does not yield (input, label) pairs.
    """
    few, many = _SAMPLES
    with autocast:
        kept = {count: _kept(model, examples_of(data, count)) for count in _SAMPLES}
    return (kept[many] - kept[few]) // (many - few)


def _kept(model: nn.Module, inputs: Any) -> int:
    """Bytes of the different storages that autograd keeps, parameters among them, and of the output."""
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given away twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    args, kwargs = split_inputs(to_device(inputs, device_of_model(model)))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = functional_call(model, buffers, args, kwargs)
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    logits = sum(leaf.numel() * max(leaf.element_size(), torch.float32.itemsize) for leaf in leaves)
    return sum(storage.nbytes() for storage in storages.values()) + logits


def largest_batch(first: int, whole: int, now: int, most: int) -> int:
    """The largest batch that keeps no more than `first` samples did in the whole model; at least first, at most `most`.

    It is a multiple of a quarter of `first`, rounded down. whole, now: bytes per sample of the model then and now.
    """
    quarters = _GRAIN * whole // max(now, 1)
    return max(first, min(most, first * quarters // _GRAIN))
