"""Low-rank layers: a weight as a matrix W (O, J), J = inputs of one output, cut to its r largest singular values,

W = U S V^T  ~  (U_r sqrt(S_r)) (sqrt(S_r) V_r^T)        (O, J) ~ (O, r) (r, J)

which is the nearest matrix of rank r: ||W - W_r||^2 = s_(r+1)^2 + s_(r+2)^2 + ... (Eckart & Young, 1936). One layer
becomes two of r (O + J) multiplications instead of O J. A linear layer has J = I. A convolution has J = I k k: k x k to
r channels, then 1 x 1 (Denton et al., NeurIPS 2014; channel decomposition, Zhang et al., TPAMI 2016, section 3.1).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ...errors import RequestError
from ..graph.cost import count_macs, count_parameters, node_macs
from ..graph.graph_pass import GraphPass, PassResult
from ..graph.nodes import attribute

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_HALVINGS = 60  # of the energy, until doubles run out


@dataclass(frozen=True)
class LowRankLayer:
    """A layer that became a pair: its rank, the largest it could have, and the share of its energy that is kept."""

    rank: int
    of: int
    energy: float


@dataclass(frozen=True)
class LowRankReport:
    """The layers that became pairs, by path, and the share of the model's MACs that is left."""

    layers: dict[str, LowRankLayer]
    left: float


@dataclass(frozen=True)
class LowRank(GraphPass[LowRankReport]):
    """Replaces linear layers and ungrouped convolutions by two thinner ones, `fc` by `fc.0` and `fc.1`, the bias last.

    A layer is replaced where that saves multiplications; one whose tensors are shared, or called more than once, stays
    whole, and so do embeddings, recurrent layers and operators that were not lifted. The report tells the rank and the
    kept energy of every new pair, and `left`, the share of the model's MACs.

    Give one of:
        energy: the least share of the squared singular values that each layer keeps, in (0, 1].
        rank: one rank for all layers, from 1.
        macs, params: the share of the model's MACs or parameters that stays, in (0, 1]: all layers keep the same
            energy, the largest that meets it.

    Raises:
        RequestError: not exactly one is given, or out of range; no energy meets the share; weights that are not finite.
    """

    name: ClassVar[str] = "low-rank"
    energy: float | None = None
    rank: int | None = None
    macs: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        given = {key: value for key, value in asdict(self).items() if value is not None}
        if len(given) != 1:
            raise RequestError(f"low-rank: give exactly one of energy, rank, macs, params; got {', '.join(given)}")
        ((key, value),) = given.items()
        if not (value >= 1 if key == "rank" else 0 < value <= 1):
            raise RequestError(f"low-rank: {key} is {value}: " + ("from 1" if key == "rank" else "above 0, at most 1"))

    @torch.no_grad()
    def rewrite(self, gm: fx.GraphModule) -> PassResult[LowRankReport]:
        macs = node_macs(gm)
        layers = [_Layer(gm, node, macs[node]) for node in _replaceable(gm)]
        pairs = {layer.path: layer.put_pair(gm, rank) for layer, rank in self._ranks(gm, layers) if layer.saves(rank)}
        gm.recompile()
        left = count_macs(gm) / max(sum(macs.values()), 1)
        return PassResult(gm, bool(pairs), LowRankReport(pairs, left))

    def _ranks(self, gm: fx.GraphModule, layers: "list[_Layer]") -> "list[tuple[_Layer, int]]":
        if self.rank is not None:
            return [(layer, self.rank) for layer in layers]
        energy = self.energy
        if self.macs is not None:
            energy = _energy_for(self.macs, "macs", count_macs(gm), layers, lambda layer: layer.macs)
        elif self.params is not None:
            energy = _energy_for(self.params, "params", count_parameters(gm), layers, lambda layer: layer.size)
        assert energy is not None
        return [(layer, layer.rank_of(energy)) for layer in layers]


class _Layer:
    """A layer that can be replaced, and the singular values of its weight."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node, macs: int) -> None:
        self.node, self.path, self.macs = node, str(node.target), macs
        self.module: Any = gm.get_submodule(self.path)
        weight = attribute(gm, f"{self.path}.weight").flatten(1)
        if not torch.isfinite(weight).all():
            raise RequestError(f"low-rank: {self.path}.weight holds values that are not finite: mend the model first")
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))  # there is no half precision SVD
        self.u, self.s, self.vt = torch.linalg.svd(exact, full_matrices=False)
        squares = self.s.double().square().cumsum(0)
        self.energies = squares / squares[-1].clamp(min=torch.finfo(torch.float64).tiny)
        self.size = weight.numel()

    def rank_of(self, energy: float) -> int:
        """The least rank that keeps this share of the squared singular values."""
        kept = self.energies.new_tensor(min(energy, float(self.energies[-1])))
        return int(torch.searchsorted(self.energies, kept)) + 1

    def saves(self, rank: int) -> bool:
        return rank * (len(self.u) + self.vt.shape[1]) < self.size

    def share(self, rank: int) -> float:
        """What is left of its multiplications and weights."""
        return rank * (len(self.u) + self.vt.shape[1]) / self.size if self.saves(rank) else 1.0

    def put_pair(self, gm: fx.GraphModule, rank: int) -> LowRankLayer:
        """Puts the pair in the layer's place; what the report says of it."""
        first, last = _pair(self.module, rank)
        root = self.s[:rank].sqrt()
        first.weight.copy_((root[:, None] * self.vt[:rank]).view_as(first.weight))
        last.weight.copy_((self.u[:, :rank] * root).view_as(last.weight))
        last.bias = self.module.bias
        for half in (first, last):
            half.weight.requires_grad_(self.module.weight.requires_grad)
        pair = nn.Module()
        pair.add_module("0", first)
        pair.add_module("1", last)
        gm.set_submodule(self.path, pair.train(self.module.training))
        with gm.graph.inserting_before(self.node):
            inner = gm.graph.create_node("call_module", f"{self.path}.0", self.node.args, self.node.kwargs)
            outer = gm.graph.create_node("call_module", f"{self.path}.1", (inner,))
        inner.meta, outer.meta = dict(self.node.meta), dict(self.node.meta)
        inner.meta["val"] = _thinner(self.node.meta["val"], rank, self.module)
        self.node.replace_all_uses_with(outer)
        gm.graph.erase_node(self.node)
        return LowRankLayer(rank, len(self.s), float(self.energies[rank - 1]))


def _pair(layer: Any, rank: int) -> tuple[Any, Any]:
    """Two layers without a bias, their weights not set yet."""
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype, "bias": False}
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, rank, **like), nn.Linear(rank, layer.out_features, **like)
    kind, place = type(layer), {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
    first = kind(layer.in_channels, rank, layer.kernel_size, padding_mode=layer.padding_mode, **place, **like)
    return first, kind(rank, layer.out_channels, 1, **like)


def _thinner(val: Tensor, rank: int, layer: Any) -> Tensor:
    shape = list(val.shape)
    shape[-1 if isinstance(layer, nn.Linear) else -len(layer.kernel_size) - 1] = rank
    return val.new_empty(shape)


def _replaceable(gm: fx.GraphModule) -> list[fx.Node]:
    """Calls of layers that nothing else calls and whose tensors nothing else reads."""
    readers: dict[int, int] = {}
    for node in gm.graph.nodes:
        found = list(gm.get_submodule(str(node.target)).parameters()) if node.op == "call_module" else []
        if node.op == "get_attr":
            found = [p for name, p in gm.named_parameters(remove_duplicate=False) if name == node.target]
        for parameter in found:
            readers[id(parameter)] = readers.get(id(parameter), 0) + 1
    return [node for node in gm.graph.find_nodes(op="call_module") if _fits(gm, node, readers)]


def _fits(gm: fx.GraphModule, node: fx.Node, readers: dict[int, int]) -> bool:
    layer: Any = gm.get_submodule(str(node.target))
    ungrouped = isinstance(layer, _CONVOLUTIONS) and layer.groups == 1
    if not (isinstance(layer, nn.Linear) or ungrouped) or any(layer.children()):
        return False
    return all(readers[id(parameter)] == 1 for parameter in layer.parameters())


def _energy_for(target: float, what: str, whole: int, layers: list[_Layer], cost: Callable[[_Layer], int]) -> float:
    """The largest energy that leaves at most `target` of `whole`, found by bisection."""

    def left(energy: float) -> float:
        return 1 - sum(cost(layer) * (1 - layer.share(layer.rank_of(energy))) for layer in layers) / max(whole, 1)

    if left(0.0) > target:
        raise RequestError(
            f"low-rank: {what}={target:g} is out of reach: {left(0.0):.3f} is left where every linear layer and "
            "convolution that can be replaced has rank 1"
        )
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) <= target else (low, middle)
    return low
