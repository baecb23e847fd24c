"""Constants that removed indices leave behind, folded into the next layer's bias.

An index whose incoming weights are zero does not vanish when it is removed: its bias c, through activations and pools,
reaches the next layer as a constant f(c), where it adds W[:, i] * f(c) to every output. One run of the graph on inputs
that are NaN, "not known", finds such values:

    y = W x + b       known where |W| has no weight on what is not known         0 * x = 0
    f(x)              not known where x is not

The sum over the removed inputs goes into the bias where it is the same at every position; at zero-padded borders a
constant other than zero is not, and then nothing is folded. Ye et al., ICLR 2018 (arXiv:1802.00124), section 3.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..dims.dims import Atom, kept_indices, new_size
from ..dims.rule_registry import Typing
from ..graph.nodes import op_name
from ..graph.restoring import evaluating
from ..modules.counted_norms import CountedLayerNorm, CountedRMSNorm
from .plan import Plan, masked_copy

_SAME = {  # not known where an argument is not, at the same or the moved place
    "relu", "relu6", "gelu", "silu", "mish", "sigmoid", "tanh", "leaky_relu", "elu", "selu", "celu", "hardswish",
    "hardsigmoid", "hardtanh", "softplus", "add", "sub", "div", "neg", "exp", "abs", "dropout", "clone", "contiguous",
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "cat", "mean", "sum",
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "upsample_nearest2d", "upsample_bilinear2d", "expand", "slice", "getitem", "split", "chunk", "select",
}  # fmt: skip
_WEIGHTED = nn.Linear | nn.modules.conv._ConvNd
_ON_LAST = {nn.LayerNorm, nn.RMSNorm, CountedLayerNorm, CountedRMSNorm}
_SCALED = nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm


@torch.no_grad()
def fold_constants(types: Typing, small: fx.GraphModule, keep: Mapping[Atom, Tensor]) -> None:
    """Adds what the removed inputs of each linear and convolution layer contribute to its bias, where constant."""
    if not _has_silent_index(types, keep):
        return
    for node, x in _Known(types.gm).layer_inputs():
        layer = types.gm.get_submodule(str(node.target))
        calls = types.gm.graph.find_nodes(op="call_module", target=node.target)
        if isinstance(layer, _WEIGHTED) and len(calls) == 1:
            _fold(types, node, layer, x, small.get_submodule(str(node.target)), keep)


def _fold(types: Typing, node: fx.Node, layer: Any, x: Tensor, into: Any, keep: Mapping[Atom, Tensor]) -> None:
    at = -1 if isinstance(layer, nn.Linear) else 1
    (source,) = node.all_input_nodes
    kept, stays = kept_indices(types.dims[source][at], keep), kept_indices(types.dims[node][at], keep)
    if kept is None:
        return
    gone = x.index_fill(at, kept.to(x.device), 0.0).nan_to_num(0.0)  # what is not constant counts as zero, as ever
    added = _call(layer, gone, layer.weight, None).movedim(at, 0).flatten(1)
    added = added if stays is None else added[stays.to(x.device)]
    if not added.any() or not torch.allclose(added, added[:, :1].expand_as(added)):
        return
    bias = torch.zeros_like(added[:, 0]) if into.bias is None else into.bias.detach()
    into.bias = nn.Parameter(bias + added[:, 0], into.weight.requires_grad)


def _has_silent_index(types: Typing, keep: Mapping[Atom, Tensor]) -> bool:
    """Whether a removed index has only zero weights coming in, in some layer."""
    for node in types.gm.graph.find_nodes(op="call_module"):
        layer = types.gm.get_submodule(str(node.target))
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, _WEIGHTED | _SCALED) or weight is None or weight.is_meta:
            continue
        dim = types.params[f"{node.target}.weight"][0]
        kept = kept_indices(dim, keep) if new_size(dim, keep) != dim.size else None
        if kept is not None:
            silent = weight.detach().flatten(1).eq(0).all(1) if weight.dim() > 1 else weight.detach().eq(0)
            silent[kept] = False
            if silent.any():
                return True
    return False


@torch.no_grad()
def masked_rests(types: Typing, scheme: Plan, keep: Mapping[Atom, Tensor], norms: set[str]) -> dict[fx.Node, Tensor]:
    """What the removed indices hold, all of their own slices zeroed, at each of these norms over a shrunk last dim,
    (1, ..., removed); only where that is known and not zero."""
    if _ON_LAST.isdisjoint(map(type, types.gm.modules())) or any(p.is_meta for p in types.gm.parameters()):
        return {}
    nodes = {node.name: node for node in types.gm.graph.nodes}
    found = {}
    for copied, x in _Known(masked_copy(types.gm, scheme)).layer_inputs():
        node = nodes[copied.name]
        if node.name in norms and type(types.gm.get_submodule(str(node.target))) in _ON_LAST:
            kept = kept_indices(types.dims[node][-1], keep)
            if kept is None:
                continue
            gone = torch.ones(x.shape[-1], dtype=torch.bool)
            gone[kept] = False
            rest = x[..., gone.to(x.device)].nan_to_num(0.0)
            if rest.any():
                found[node] = rest
    return found


class _Known(fx.Interpreter):
    """Runs a graph on inputs that are not known; tensors are NaN where they depend on them, None if that is unclear."""

    def layer_inputs(self) -> Iterator[tuple[fx.Node, Tensor]]:
        """Each module call and what comes into it, before it runs; not where that is unclear."""
        for node in self.graph.nodes:
            if node.op == "call_module" and self.env[node.args[0]] is not None:
                yield node, self.env[node.args[0]]
            self.env[node] = self._value(node)

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            val = node.meta["val"]
            known = isinstance(val, Tensor) and val.is_floating_point()
            shape = [1 if 0 in node.meta.get("dynamic", ()) else val.shape[0], *val.shape[1:]] if known else []
            like = next((p for p in self.module.parameters() if p.is_floating_point()), val)  # it may have been moved
            return torch.full(shape, torch.nan, dtype=like.dtype, device=like.device) if known else None
        if node.op == "output":
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        target: Any = node.target
        if any(self.env[n] is None for n in node.all_input_nodes):
            return None
        if node.op == "call_module":
            return self._module(self.module.get_submodule(str(node.target)), *args, **kwargs)
        if node.op == "get_attr":
            value = self.get_attr(target, args, kwargs)
            return value.clone() if isinstance(value, Tensor) else value  # a later call may write to it
        if op_name(node) == "mul":
            product = target(*args, **kwargs)
            if not isinstance(product, Tensor):  # of sizes
                return product
            zero = torch.zeros_like(product)
            for factor in args[:2]:
                zero = zero + (torch.as_tensor(factor, device=product.device) == 0)
            return product.masked_fill(zero > 0, 0.0)
        return target(*args, **kwargs) if op_name(node) in _SAME | {"sym_size"} else None

    def _module(self, layer: Any, x: Tensor) -> Tensor | None:
        if isinstance(layer, _WEIGHTED):
            reached = _call(layer, x.isnan().to(x.dtype), layer.weight.abs(), None) > 0
            return _call(layer, x.nan_to_num(0.0), layer.weight, layer.bias).masked_fill(reached, torch.nan)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            shape = [1, -1] + [1] * (x.dim() - 2)
            gamma = torch.ones_like(layer.running_mean) if layer.weight is None else layer.weight
            reached = x.isnan() & (gamma != 0).view(shape)
            with evaluating(layer):
                return layer(x.nan_to_num(0.0)).masked_fill(reached, torch.nan)
        if type(layer) in _ON_LAST and layer.weight is not None:
            bias = getattr(layer, "bias", None)
            known = torch.zeros_like(layer.weight) if bias is None else bias
            return torch.where(layer.weight == 0, known, torch.nan).expand_as(x).clone()
        return x if isinstance(layer, nn.modules.dropout._DropoutNd) else None


def _call(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    given: Any = {"weight": weight, "bias": bias}
    return torch.func.functional_call(layer, given, (x,))
