"""Unstructured magnitude pruning, the baseline of structured pruning: single weights become zero, no shape changes.

Dense kernels multiply the zeros like any number. `as_sparse` runs the layers that have sparse kernels in them, so that
the speed of unstructured sparsity can be measured for what it is.
"""

import warnings
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ...errors import RequestError
from ...passes.graph.copying import deep_copy
from ...passes.graph.cost import node_macs
from ...passes.modules.ragged_recurrent import RaggedRecurrent
from ..options.choices import WeightScope
from ..training.hooks import Hook, TrainingRun
from .reports import PruneWeightsReport

aten = torch.ops.aten

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, RaggedRecurrent)
_OPERATORS = (aten.linear, aten.conv1d, aten.conv2d, aten.conv3d)  # layers that were not lifted


def weights_of(gm: fx.GraphModule) -> dict[str, nn.Parameter]:
    """The weights of linear, convolution and recurrent layers by name; biases, norms and embeddings are none.

    A weight that an embedding shares is left out, and a tied one counts once.
    """
    layers = {name: module for name, module in gm.named_modules() if isinstance(module, _LAYERS)}
    own = {f"{at}.{n}": p for at, layer in layers.items() for n, p in layer.named_parameters() if _is_weight(n)}
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr") if any(map(_multiplies(node), node.users))}
    embedded = {id(m.weight) for m in gm.modules() if isinstance(m, nn.Embedding)}
    found = {name: p for name, p in gm.named_parameters() if name in own or name in read}  # a tied one comes once
    return {name: p for name, p in found.items() if id(p) not in embedded}


def _is_weight(name: str) -> bool:
    return name.rpartition(".")[2].startswith("weight")


def _multiplies(weight: fx.Node) -> Callable[[fx.Node], bool]:
    """Whether a call multiplies its input with this weight."""
    return lambda user: getattr(user.target, "overloadpacket", None) in _OPERATORS and user.args[1] is weight


@torch.no_grad()
def with_zeros(gm: fx.GraphModule, sparsity: float, scope: WeightScope) -> fx.GraphModule:
    """See `baselines.prune_weights`, which trains what is left too."""
    if not 0 <= sparsity <= 1:
        raise RequestError(f"sparsity is the share of weights that becomes zero, 0 to 1; got {sparsity}")
    if scope not in get_args(WeightScope):
        raise RequestError(f"there is no scope {scope!r}: use one of {', '.join(get_args(WeightScope))}")
    result = deep_copy(gm)
    weights = weights_of(result)
    if not weights:
        raise RequestError("the model has no linear, convolution or recurrent layer to take weights from")
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise RequestError(f"{name} holds values that are not finite: mend the model first")
    groups = [list(weights.values())] if scope == "global" else [[weight] for weight in weights.values()]
    for group in groups:
        _zero_smallest(group, sparsity)
    zeros = {name: float((weight == 0).double().mean()) for name, weight in weights.items()}
    PruneWeightsReport(sparsity=sparsity, scope=scope, zeros=zeros).keep_in(result)
    return result


def _zero_smallest(weights: list[nn.Parameter], sparsity: float) -> None:
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    goes = torch.zeros_like(magnitudes, dtype=torch.bool)
    goes[magnitudes.topk(round(sparsity * len(magnitudes)), largest=False, sorted=False).indices] = True
    for weight, zero in zip(weights, goes.split([weight.numel() for weight in weights]), strict=True):
        weight[zero.view_as(weight)] = 0


class HoldZeros(Hook):
    """Keeps every weight of `gm` zero which is zero when its training begins."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._weights = list(weights_of(gm).values())

    def begin(self, run: TrainingRun) -> None:
        self._zeros = [weight == 0 for weight in self._weights]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for weight, zero in zip(self._weights, self._zeros, strict=True):
            weight.masked_fill_(zero, 0)


# --- sparse kernels --------------------------------------------------------------------------------------------------


class SparseLinear(nn.Module):
    """y = x W^T + b with W (O, I) in compressed rows: x (..., I) -> y (..., O); for inference."""

    starts: Tensor
    columns: Tensor

    def __init__(self, layer: nn.Module, macs: int) -> None:
        super().__init__()
        weight: Any = layer.weight
        self.shape = (len(weight), weight[0].numel())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
            rows = weight.detach().flatten(1).to_sparse_csr()
        self.values = nn.Parameter(rows.values(), requires_grad=False)  # 32-bit indices: the quicker kernels
        self.register_buffer("starts", rows.crow_indices().int())
        self.register_buffer("columns", rows.col_indices().int())
        self.bias: Any = layer.bias
        self.macs_per_sample = round(macs * self.values.numel() / weight.numel())

    def product(self, x_IN: Tensor) -> Tensor:
        """W x: (I, N) -> (O, N)."""
        rows = (self.starts, self.columns, self.values)
        return torch.sparse_csr_tensor(*rows, self.shape, check_invariants=False) @ x_IN

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.flatten(0, -2).T).T.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class SparseConv2d(SparseLinear):
    """A convolution as the sparse product of its weight (O, I k k) with the patches of its input (im2col)."""

    def __init__(self, layer: nn.Conv2d, macs: int) -> None:
        super().__init__(layer, macs)
        self.window: dict[str, Any] = {key: getattr(layer, key) for key in ("kernel_size", "dilation", "stride")}
        self.window["padding"] = layer.padding

    def forward(self, x_BIHW: Tensor) -> Tensor:
        patches = F.unfold(x_BIHW, **self.window)  # (B, I k k, places)
        batch, inputs, places = patches.shape
        y = self.product(patches.transpose(0, 1).reshape(inputs, batch * places))
        y = y.view(-1, batch, places).transpose(0, 1)
        if self.bias is not None:
            y = y + self.bias[:, None]
        return y.reshape(batch, self.shape[0], *self._places(x_BIHW))

    def _places(self, x: Tensor) -> list[int]:
        """Height and width of the output."""
        settings = (self.window[key] for key in ("kernel_size", "dilation", "stride", "padding"))
        each = zip(x.shape[2:], *settings, strict=True)
        return [(size + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for size, kernel, gap, step, pad in each]


def as_sparse(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of `gm` for inference in which linear layers and 2-D convolutions with zeros run on sparse kernels.

    Only the numbers that are not zero are stored and multiplied, and counted as parameters and MACs. Grouped and
    other convolutions, recurrent layers, for which torch has no sparse kernels, and layers called at several sizes stay
    dense.
    """
    result = deep_copy(gm)
    macs: dict[str, set[int]] = {}
    for node, count in node_macs(result).items():
        if node.op == "call_module":
            macs.setdefault(str(node.target), set()).add(count)
    for path, counts in macs.items():
        layer = result.get_submodule(path)
        if len(counts) > 1:  # calls of different sizes: a module can tell the MACs of one only
            continue
        if isinstance(layer, nn.Linear) and not layer.weight.all():
            result.set_submodule(path, SparseLinear(layer, *counts))
        elif isinstance(layer, nn.Conv2d) and _unfolds(layer) and not layer.weight.all():
            result.set_submodule(path, SparseConv2d(layer, *counts))
    return result.eval()


def _unfolds(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
