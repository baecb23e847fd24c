"""Batch norms in evaluation mode, y = (x - mean) / sqrt(var + eps) * gamma + beta, folded into the layer before them:

w' = w * gamma / sqrt(var + eps)        b' = (b - mean) * gamma / sqrt(var + eps) + beta
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..graph.graph_pass import EVALUATING, Condition, GraphPass, PassResult
from ..graph.restoring import evaluating

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class FoldedNorms:
    """The paths of the batch norms that are gone."""

    folded: tuple[str, ...]


@dataclass(frozen=True)
class FoldBatchNorm(GraphPass[FoldedNorms]):
    """Removes each batch norm that is the only reader of a convolution or linear layer: fewer calls, the same function.

    The result is for inference: it has no batch statistics left to train with. Layers that are called more than once,
    or share a weight, grouped transposed convolutions and batch norms without running statistics stay.

    `within`: only those below the module of this name; all by default.

    Raises:
        RequestError: the model is in training mode.
    """

    name: ClassVar[str] = "fold-batch-norm"
    requires: ClassVar[tuple[Condition, ...]] = (EVALUATING,)
    within: str = ""

    def rewrite(self, gm: fx.GraphModule) -> PassResult[FoldedNorms]:
        calls: dict[int, list[str]] = {}
        for node in gm.graph.find_nodes(op="call_module"):
            for parameter in gm.get_submodule(str(node.target)).parameters():
                calls.setdefault(id(parameter), []).append(node.name)
        below = f"{self.within}." if self.within else ""
        norms = [n for n in gm.graph.find_nodes(op="call_module") if str(n.target).startswith(below)]
        folded = tuple(str(norm.target) for norm in norms if _try_fold(gm, norm, calls))
        gm.recompile()
        return PassResult(gm, bool(folded), FoldedNorms(folded))


def _try_fold(gm: fx.GraphModule, norm: fx.Node, calls: dict[int, list[str]]) -> bool:
    """Folds `norm` into its input's layer if it can; whether it did."""
    module, before = _module(gm, norm), norm.args[0] if norm.args else None
    if not isinstance(module, _BatchNorm) or module.running_mean is None or not isinstance(before, fx.Node):
        return False
    layer = _module(gm, before)
    if len(before.users) > 1 or not isinstance(layer, (*_CONVOLUTIONS, nn.Linear)):
        return False
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1:
        return False  # torch's own fusion has no form for it
    if any(len(calls[id(p)]) > 1 for p in (*layer.parameters(), *module.parameters())):
        return False
    if isinstance(layer, nn.Linear) and len(norm.meta["val"].shape) != 2:
        return False  # (B, L, C): the norm counts L as its channels
    with evaluating(gm):
        fused = _fused(layer, module)
    gm.set_submodule(str(before.target), fused)
    norm.replace_all_uses_with(before)
    gm.graph.erase_node(norm)
    gm.delete_submodule(str(norm.target))
    return True


def _fused(layer: nn.Module, norm: Any) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, norm)
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return fuse_conv_bn_eval(layer, norm, transpose=transposed)  # type: ignore[type-var]


def _module(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None
