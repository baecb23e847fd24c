"""Importances that read the weights alone. With w_i everything that belongs to index i, over all slices of its axis:

    l1(i)               = sum |w_i|                                     (Li et al., ICLR 2017)
    l2(i)               = ||w_i||
    bn-scale(i)         = sum of |gamma_i| over the BatchNorms          (network slimming: Liu et al., ICCV 2017)
    geometric-median(i) = sum_j ||w_i - w_j||                           (FPGM: He et al., CVPR 2019)
    lamp(i)             = ||w_i||^2 / sum over j with ||w_j|| >= ||w_i|| of ||w_j||^2   (Lee et al., ICLR 2021)
    random(i)           ~ U(0, 1)

LAMP is defined for the weights of one layer; here a group takes the place of a weight and its axis that of the layer.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import RequestError
from ...passes.axes.axes import Axis
from ...passes.graph.nodes import attribute, bound_args, op_name
from .group_sums import Context, Scores, group_sums, parameter_slices


def l1_scores(gm: fx.GraphModule, axes: Iterable[Axis], context: Context | None = None) -> Scores:
    """L1 norm of each group, by axis name."""
    return group_sums(gm, axes, torch.abs)


def l2_scores(gm: fx.GraphModule, axes: Iterable[Axis], context: Context | None = None) -> Scores:
    """L2 norm of each group, by axis name."""
    return {name: energy.sqrt() for name, energy in _energies(gm, axes).items()}


def lamp_scores(gm: fx.GraphModule, axes: Iterable[Axis], context: Context | None = None) -> Scores:
    """Each group's share of the energy of its axis that is left once all smaller groups are gone, by axis name.

    The branches of the model, each an axis of its own, are ranked against each other as if they were one axis.
    """
    energies = _energies(gm, axes)
    scores = {name: _lamp(energy) for name, energy in energies.items()}
    branches = [name for name, energy in energies.items() if len(energy) == 1]
    if branches:
        together = _lamp(torch.cat([energies[name] for name in branches]))
        scores |= dict(zip(branches, together.split(1), strict=True))
    return scores


def random_scores(gm: fx.GraphModule, axes: Iterable[Axis], context: Context | None = None) -> Scores:
    """Random numbers in 0..1 that depend on the context's seed alone, by axis name: what every method must beat."""
    generator = (context or Context()).generator()
    return {axis.name: torch.rand(axis.size, generator=generator, dtype=torch.float64) for axis in axes}


def geometric_median_scores(gm: fx.GraphModule, axes: Iterable[Axis], context: Context | None = None) -> Scores:
    """Summed distance of each group to the others of its axis, by axis name: the one that the others can replace goes.

    A branch has no others: it takes its L2 norm.
    """
    axes = list(axes)
    alone = l2_scores(gm, [axis for axis in axes if axis.size == 1])
    return {axis.name: alone[axis.name] if axis.size == 1 else _distances(gm, axis).sum(1) for axis in axes}


def bn_scale_scores(gm: fx.GraphModule, axes: Iterable[Axis], context: Context | None = None) -> Scores:
    """Sum of |gamma| over the BatchNorms on each axis, by axis name.

    An axis without BatchNorm takes its L2 norms instead; both are divided by their means before they are compared.

    Raises:
        RequestError: no axis has a BatchNorm.
    """
    axes, scales = list(axes), _batchnorm_scales(gm)
    having = [axis for axis in axes if any(s.tensor in scales for s in axis.slices)]
    if not having:
        raise RequestError("importance='bn-scale' needs BatchNorm, and no prunable axis has one: use l2 or taylor")
    gammas = {attribute(gm, name) for name in scales}
    found = group_sums(gm, having, torch.abs, lambda w: (w,) if w in gammas else ())
    others = l2_scores(gm, [axis for axis in axes if axis.name not in found])
    return {axis.name: found[axis.name] if axis.name in found else others[axis.name] for axis in axes}


def _energies(gm: fx.GraphModule, axes: Iterable[Axis]) -> Scores:
    return group_sums(gm, axes, torch.square)


def _lamp(energy: Tensor) -> Tensor:
    order = energy.argsort(stable=True)
    ascending = energy[order]
    left = ascending.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(ascending, ascending)  # equal energies share the largest rest
    scores = torch.empty_like(energy)
    scores[order] = torch.where(ascending > 0, ascending / left[first].clamp_min(torch.finfo(energy.dtype).tiny), 0)
    return scores


def _distances(gm: fx.GraphModule, axis: Axis) -> Tensor:
    """(size, size) Euclidean distances between groups, through their inner products summed over the slices."""
    inner = torch.zeros(axis.size, axis.size, dtype=torch.float64)
    for tensor, dim, positions in parameter_slices(gm, axis):
        rows = tensor.detach().double().cpu().movedim(dim, 0)[positions.flatten()].reshape(axis.size, -1)
        inner += rows @ rows.T
    square = inner.diagonal()
    return (square[:, None] + square[None, :] - 2 * inner).clamp_min(0).sqrt().fill_diagonal_(0)


def _batchnorm_scales(gm: fx.GraphModule) -> set[str]:
    """Names of the parameters that scale a BatchNorm, as a module or as an operator."""
    names = set()
    for node in gm.graph.nodes:
        if node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), _BatchNorm):
            names.add(f"{node.target}.weight")
        elif node.op == "call_function" and "batch_norm" in op_name(node):
            weight = bound_args(node).get("weight")
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                names.add(str(weight.target))
    return {name for name in names if isinstance(_parameter(gm, name), nn.Parameter)}


def _parameter(gm: fx.GraphModule, name: str) -> nn.Parameter | None:
    return attribute(gm, name)
