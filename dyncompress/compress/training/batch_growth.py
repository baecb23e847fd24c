"""A batch that grows as the model shrinks: memory that is freed takes more samples (Lym et al., SC 2019).

What autograd keeps for the backward pass of B samples is fixed + B * m bytes: m is measured, by calls with two batch
sizes. For a model that had m_0 and now has m, a batch of b instead of b_0 needs no more if b * m <= b_0 * m_0.
"""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ...passes.graph.inputs import Inputs, split_inputs
from .batches import LabelledData, device_of_model, examples_of, to_device
from .hooks import Hook, TrainingRun
from .surgery import Surgery

_SAMPLES = (2, 4)  # a batch norm cannot train on one
_GRAIN = 4  # batches grow by quarters of the first


class GrowBatch(Hook):
    """After a surgery, the largest batch that keeps no more than the first did in the whole model; the learning rates
    grow with it. It comes after the hook that operates."""

    def begin(self, run: TrainingRun) -> None:
        self._run, self._whole, self._operated = run, _bytes_in_all(run), False

    def adopt(self, surgery: Surgery) -> None:
        self._operated = True

    def after_epoch(self, epoch: int) -> None:
        if not self._operated:
            return
        self._operated, now = False, self._run.timetable
        most = now.samples // now.processes
        size = largest_batch(now.batch_sizes[0], self._whole, _bytes_in_all(self._run), most)
        self._run.reschedule(now.with_batches(epoch, size))

    def state_dict(self) -> dict[str, Any]:
        return {"batch_sizes": list(self._run.timetable.batch_sizes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._operated = False  # the batch has grown by what was taken out
        self._run.reschedule(replace(self._run.timetable, batch_sizes=tuple(state["batch_sizes"])))


def _bytes_in_all(run: TrainingRun) -> int:
    """`bytes_per_sample` of the model as it is, the sum over all processes."""
    own = bytes_per_sample(run.model, run.dataset, run.accelerator.autocast())
    return int(run.accelerator.reduce(torch.tensor(own, device=run.accelerator.device), "sum"))


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


def _kept(model: nn.Module, inputs: Inputs) -> int:
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
