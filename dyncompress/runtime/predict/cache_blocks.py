"""Large batches on a CPU, a block of samples after the other: what one layer writes is still in a cache for the next.

The largest activation of a block takes 4 MiB for each thread, or 32 samples whatever they take: with fewer, a layer
would read its weights too often.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...passes.graph.meta import Input, TensorInput

_BYTES, _LEAST = 4 * 2**20, 32


def largest_value_bytes(gm: fx.GraphModule, inputs: Iterable[Input]) -> int:
    """Bytes of the largest value a graph computes, for one sample; `inputs` are those of the captured graph."""
    batch = next(given.shape[0] for given in inputs if isinstance(given, TensorInput) and given.per_sample)
    computed = [node.meta.get("val") for node in gm.graph.nodes if node.op in ("call_module", "call_function")]
    tensors = [value for value in pytree.tree_leaves(computed) if isinstance(value, Tensor)]
    return max((tensor.numel() * tensor.element_size() // batch for tensor in tensors), default=0)


def blocks(n: int, bytes_per_sample: int, device: torch.device) -> list[slice]:
    """`n` samples, at least one, in as few blocks as the caches allow; no two differ by more than a sample."""
    if n <= _LEAST or device.type != "cpu":
        return [slice(0, n)]
    most = max(_LEAST, _BYTES * torch.get_num_threads() // max(bytes_per_sample, 1))
    count = math.ceil(n / most)
    return [slice(n * k // count, n * (k + 1) // count) for k in range(count)]
