"""Attention over more, or fewer, leading dims than batch and heads, as four-dimensional attention for ONNX."""

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def with_plain_attention(program: ExportedProgram) -> ExportedProgram:
    """The same program, all of its attention calls of rank 4."""
    ranks = {node.args[0].meta["val"].dim() for node in program.graph.find_nodes(op="call_function", target=_ATTENTION)}
    return program if ranks <= {4} else program.run_decompositions({_ATTENTION: _attention})


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """q: (*lead, heads, queries, width)."""
    if q.dim() == 4:
        return NotImplemented
    lead = q.shape[:-3]
    if attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = _merged(attn_mask.expand(*lead, *attn_mask.shape[-3:]))
    y = _ATTENTION(_merged(q), _merged(k), _merged(v), attn_mask, *args, **kwargs)
    return y.reshape(*lead, *y.shape[-3:])


def _merged(x: Tensor) -> Tensor:
    """(*lead, heads, tokens, width) -> (product of lead, heads, tokens, width)."""
    return x.reshape(-1, *x.shape[-3:])
