"""Which nodes of a stretch of graph are zero once some of its tensors are.

f(0) = 0            activations through the origin, views, pools
0 * x = 0           products, matrix products, attention with zero values
x @ 0 + 0 = 0       affine layers whose weight and bias are zero, whatever comes in
0 + 0 = 0           sums, concatenations
"""

from collections.abc import Iterable

from torch import Tensor, fx, nn

from ..graph.nodes import attribute, op_name
from ..modules.ragged_recurrent import RaggedRecurrent

_IF_FIRST_IS = {
    "relu", "relu6", "gelu", "silu", "mish", "tanh", "leaky_relu", "elu", "selu", "celu", "hardswish", "hardtanh",
    "prelu", "rrelu", "sin", "asin", "atan", "sinh", "erf", "neg", "abs", "square", "sqrt", "sign", "dropout",
    "feature_dropout", "alpha_dropout", "clone", "contiguous", "to", "_to_copy", "type_as", "detach", "alias", "view",
    "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "unsqueeze", "permute",
    "transpose", "t", "expand", "expand_as", "repeat", "slice", "select", "narrow", "split", "split_with_sizes",
    "chunk", "unbind", "getitem", "roll", "flip", "movedim", "mean", "sum", "amax", "amin", "max_pool1d",
    "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
    "upsample_nearest2d", "upsample_bilinear2d", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "index",
    "index_select", "div", "glu",
}  # fmt: skip
_IF_ANY_IS = {"mul", "matmul", "mm", "bmm", "einsum", "outer"}
_IF_ALL_ARE = {"add", "sub", "cat", "stack", "concat", "maximum", "minimum"}
_AFFINE = (
    nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    nn.RNNBase, RaggedRecurrent, nn.Embedding,
)  # fmt: skip


def zero_nodes(gm: fx.GraphModule, nodes: Iterable[fx.Node], tensors: set[str]) -> set[fx.Node]:
    """The `nodes`, in graph order, that are zero once the named parameters and buffers are; any other may be."""
    zeros: set[fx.Node] = set()
    for node in nodes:
        if _is_zero(gm, node, tensors, zeros):
            zeros.add(node)
    return zeros


def _is_zero(gm: fx.GraphModule, node: fx.Node, tensors: set[str], zeros: set[fx.Node]) -> bool:
    if node.op == "get_attr":
        return str(node.target) in tensors
    if node.op == "call_module":
        module = attribute(gm, str(node.target))
        if not isinstance(module, _AFFINE):
            return isinstance(module, nn.modules.dropout._DropoutNd) and node.args[0] in zeros
        learned = {f"{node.target}.{name}" for name, _ in module.named_parameters()}
        return bool(learned) and learned <= tensors
    given = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
    name, zero = op_name(node), [a in zeros for a in given]
    if name in _IF_FIRST_IS:
        return node.args[0] in zeros
    if name in _IF_ANY_IS:
        return any(zero)
    if name in _IF_ALL_ARE:
        return bool(zero) and all(zero)
    if name in {"linear", "conv1d", "conv2d", "conv3d"}:
        return any(zero[:2]) and all(zero[2:])
    if name == "addmm":
        return zero[0] and any(zero[1:])
    return name == "scaled_dot_product_attention" and node.args[2] in zeros
