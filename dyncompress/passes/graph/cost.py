"""Cost: multiply-accumulates (MACs) of every node for one sample, parameters and bytes.

    convolution   outputs * weights per output channel        linear   outputs * in_features
    matmul        outputs * contracted size                   attention   queries * keys * (head_dim + value_dim)
    LSTM/GRU/RNN  steps * weights of the cell

Shapes come from `meta["val"]` at the capture batch. Elementwise operators, norms, pools, biases and look-ups count 0.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..modules.ragged_recurrent import RaggedRecurrent
from .nodes import attribute
from .walk import downstream

aten = torch.ops.aten


def node_macs(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """MACs of every node for one sample; work that does not depend on the batch counts whole."""
    depends = downstream(gm.graph, [n for n in gm.graph.nodes if 0 in n.meta.get("dynamic", ())])
    macs = {}
    for node in gm.graph.nodes:
        whole = _whole_macs(gm, node)
        shared = node in depends and whole % CAPTURE_BATCH == 0
        macs[node] = whole // CAPTURE_BATCH if shared else whole
    return macs


def count_macs(gm: fx.GraphModule) -> int:
    """MACs of one forward pass for one sample, at the captured sequence lengths."""
    return sum(node_macs(gm).values())


def count_parameters(gm: nn.Module) -> int:
    """Numbers in the parameters; tied parameters count once."""
    return sum(p.numel() for p in gm.parameters())


def count_bytes(gm: nn.Module) -> int:
    """Bytes of parameters and buffers; tied ones count once."""
    tensors = {id(t): t for t in [*gm.parameters(), *gm.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _whole_macs(gm: fx.GraphModule, node: fx.Node) -> int:
    """MACs of one node at the capture batch."""
    if node.op == "call_function":
        packet = getattr(node.target, "overloadpacket", None)
        count = _OP_MACS.get(packet) or _OTHER_MACS.get(str(packet))
        return count(node) if count else 0
    if node.op != "call_module":
        return 0
    module = attribute(gm, str(node.target))
    known = getattr(module, "macs_per_sample", None)  # modules of this package, such as exit heads, say it themselves
    if known is not None:
        return known * CAPTURE_BATCH
    return next((count(node, module) for kind, count in _MODULE_MACS.items() if isinstance(module, kind)), 0)


def _val(arg: Any) -> Tensor:
    return arg.meta["val"]


def _shapes(node: fx.Node) -> list[torch.Size]:
    """Shapes of the tensor arguments, in order."""
    return [_val(a).shape for a in node.args if isinstance(a, fx.Node) and isinstance(_val(a), Tensor)]


# --- operators ---------------------------------------------------------------------------------------------------


def _conv(node: fx.Node) -> int:
    weight = _shapes(node)[1]
    return _val(node).numel() * math.prod(weight[1:])


def _conv_transpose(node: fx.Node) -> int:
    x, weight = _shapes(node)[:2]
    return x.numel() * math.prod(weight[1:])


def _convolution(node: fx.Node) -> int:
    transposed = node.args[6]
    return _conv_transpose(node) if transposed else _conv(node)


def _product(first: int) -> Callable[[fx.Node], int]:
    """Outputs times the contracted last dim of tensor argument number `first`."""

    def count(node: fx.Node) -> int:
        return _val(node).numel() * _shapes(node)[first][-1]

    return count


def _addbmm(node: fx.Node) -> int:
    _, lhs, rhs = _shapes(node)[:3]
    return lhs.numel() * rhs[-1]


def _bilinear(node: fx.Node) -> int:
    return _val(node).numel() * math.prod(_shapes(node)[2][1:])


def _attention(node: fx.Node) -> int:
    """scaled_dot_product_attention: query (..., T, E), key (..., S, E), value (..., S, V); masked pairs count too."""
    query, key, value = _shapes(node)[:3]
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _cell(node: fx.Node) -> int:
    """lstm_cell, gru_cell, rnn_*_cell: (input, state(s), w_ih, w_hh, ...)."""
    batch = _shapes(node)[0][0]
    return batch * sum(_val(w).numel() for w in node.args[2:4])


def _einsum(node: fx.Node) -> int:
    """Contracts the operands from the left, two at a time; products without a contraction are elementwise."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    sizes: dict[str, int] = {}
    expanded = [_labels(t, _val(x).shape, sizes) for t, x in zip(terms, operands, strict=True)]  # type: ignore[arg-type]
    final = _labels(output, _val(node).shape, sizes) if "->" in equation else _implicit(expanded)
    total, left = 0, expanded[0]
    for position, right in enumerate(expanded[1:], start=1):
        later = final | set().union(*expanded[position + 1 :])
        pair = (left & (right | later)) | (right & (left | later))  # the rest is summed away first
        if (left & right) - later:
            total += math.prod(sizes[label] for label in pair)
        left = pair & later
    return total


def _labels(term: str, shape: torch.Size, sizes: dict[str, int]) -> set[str]:
    """The labels of one term, `...` as one numbered label per dim (counted from the right); notes their sizes."""
    before, dots, after = term.partition("...")
    hidden = len(shape) - len(before) - len(after) if dots else 0
    labels = [*before, *(f".{hidden - i}" for i in range(hidden)), *after]
    for label, size in zip(labels, shape, strict=True):
        sizes[label] = max(size, sizes.get(label, 1))
    return set(labels)


def _implicit(terms: list[set[str]]) -> set[str]:
    """The output of an equation without an arrow: every label that occurs once, and the dots."""
    return {x for term in terms for x in term if x[0] == "." or sum(x in t for t in terms) == 1}


_OTHER_MACS = {"transformers.grouped_mm_fallback": _product(0)}  # known by name only where transformers is loaded
_OP_MACS: dict[Any, Callable[[fx.Node], int]] = {
    aten.conv1d: _conv,
    aten.conv2d: _conv,
    aten.conv3d: _conv,
    aten.conv_transpose1d: _conv_transpose,
    aten.conv_transpose2d: _conv_transpose,
    aten.conv_transpose3d: _conv_transpose,
    aten.convolution: _convolution,
    aten.linear: _product(0),
    aten.matmul: _product(0),
    aten.mm: _product(0),
    aten.bmm: _product(0),
    aten._grouped_mm: _product(0),
    aten.mv: _product(0),
    aten.dot: _product(0),
    aten.addmm: _product(1),
    aten.addmv: _product(1),
    aten.baddbmm: _product(1),
    aten.addbmm: _addbmm,
    aten.bilinear: _bilinear,
    aten.einsum: _einsum,
    aten.scaled_dot_product_attention: _attention,
    aten.lstm_cell: _cell,
    aten.gru_cell: _cell,
    aten.rnn_tanh_cell: _cell,
    aten.rnn_relu_cell: _cell,
}


# --- modules -----------------------------------------------------------------------------------------------------


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight


def _conv_module(node: fx.Node, module: nn.Module) -> int:
    return _val(node).numel() * math.prod(_weight(module).shape[1:])


def _conv_transpose_module(node: fx.Node, module: nn.Module) -> int:
    return _val(node.args[0]).numel() * math.prod(_weight(module).shape[1:])


def _linear_module(node: fx.Node, module: nn.Module) -> int:
    return _val(node).numel() * _weight(module).shape[1]


def _recurrent_module(node: fx.Node, module: nn.Module) -> int:
    """Every step multiplies all weight matrices of all layers and directions once."""
    steps = math.prod(_val(node.args[0]).shape[:-1])
    return steps * sum(p.numel() for name, p in module.named_parameters() if name.startswith("weight"))


_MODULE_MACS: dict[type[nn.Module], Callable[[fx.Node, nn.Module], int]] = {
    nn.modules.conv._ConvTransposeNd: _conv_transpose_module,
    nn.modules.conv._ConvNd: _conv_module,
    nn.Linear: _linear_module,
    nn.RNNBase: _recurrent_module,
    RaggedRecurrent: _recurrent_module,
}
CAPTURE_BATCH = 53
