"""The sizes standard modules write down (in_features, groups, hidden_size, ...), read again from their new tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..dims.dims import Atom, new_size
from ..dims.rule_registry import Typing
from ..graph.nodes import attribute
from ..modules.counted_norms import CountedGroupNorm, CountedLayerNorm, CountedRMSNorm
from ..modules.exit_heads import ExitHead, ImageHead, TokenHead
from ..modules.ragged_recurrent import RaggedRecurrent


def resize_modules(types: Typing, small: fx.GraphModule, keep: Mapping[Atom, Tensor]) -> None:
    """Updates every called module of `small`, whose tensors are already sliced."""
    for node in types.gm.graph.find_nodes(op="call_module"):
        module = attribute(small, str(node.target))
        if isinstance(module, nn.modules.conv._ConvNd):
            _conv(types, node, module, keep)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = module.weight.shape
        elif isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | CountedGroupNorm):
            _channels(types, node, module, keep)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm | CountedLayerNorm | CountedRMSNorm):
            shape = types.dims[node][-len(module.normalized_shape) :]
            module.normalized_shape = tuple(new_size(d, keep) for d in shape)
        elif isinstance(module, nn.PReLU):
            module.num_parameters = len(module.weight)
        elif isinstance(module, ExitHead):
            _head(module)
        elif isinstance(module, nn.RNNBase | RaggedRecurrent):
            _recurrent(types, node, small, module, keep)


def _conv(types: Typing, node: fx.Node, module: Any, keep: Mapping[Atom, Tensor]) -> None:
    x, out = types.dims[node.args[0]][1], types.dims[node][1]  # type: ignore[index]
    module.in_channels, module.out_channels = new_size(x, keep), new_size(out, keep)
    module.groups = new_size(types.groups[node], keep)


def _channels(types: Typing, node: fx.Node, module: Any, keep: Mapping[Atom, Tensor]) -> None:
    channels = new_size(types.dims[node][1], keep)
    if isinstance(module, nn.GroupNorm | CountedGroupNorm):
        module.num_groups, module.num_channels = new_size(types.groups[node], keep), channels
    else:
        module.num_features = channels


def _head(head: Any) -> None:
    width = head.linear.in_features = head.linear.weight.shape[1]
    if isinstance(head, ImageHead):
        head.channels = width // head.grid**2
    else:
        head.features = width
    if isinstance(head, TokenHead):
        head.norm.normalized_shape = (width,)


def _recurrent(types: Typing, node: fx.Node, small: fx.GraphModule, module: Any, keep: Mapping[Atom, Tensor]) -> None:
    suffixes = [
        f"_l{layer}{d}"
        for layer in range(module.num_layers)
        for d in (("", "_reverse") if module.bidirectional else ("",))
    ]
    outs = [getattr(module, f"weight_hh{s}").shape[1] for s in suffixes]
    hidden = [getattr(module, f"weight_hr{s}").shape[1] for s in suffixes] if module.proj_size else outs
    proj = outs if module.proj_size else []
    wide = any(p >= h for p, h in zip(proj, hidden, strict=False))  # nn.LSTM projects to less than its cell only
    if isinstance(module, RaggedRecurrent) or len(set(hidden)) > 1 or len(set(proj)) > 1 or wide:
        _replace_by_ragged(small, str(node.target), module, hidden, proj)
        return
    module.input_size, module.hidden_size = module.weight_ih_l0.shape[1], hidden[0]
    module.proj_size = proj[0] if proj else 0


def _replace_by_ragged(small: fx.GraphModule, path: str, module: Any, hidden: list[int], proj: list[int]) -> None:
    if isinstance(module, RaggedRecurrent):
        settings = module.spec()["args"]
    else:
        settings = {n: getattr(module, n) for n in ("mode", "bias", "batch_first", "dropout", "bidirectional")}
    settings |= {"input_size": module.weight_ih_l0.shape[1], "hidden_sizes": hidden, "proj_sizes": proj}
    with torch.device("meta"):
        ragged = RaggedRecurrent(**settings)
    for name, tensor in module._parameters.items():
        ragged._parameters[name] = tensor
    small.set_submodule(path, ragged.train(module.training))
