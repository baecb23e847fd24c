"""Normalisations: per-channel ones unify their channel; the others also average over the dims they normalise."""

from typing import Any

from torch import fx, nn

from ...modules.counted_norms import CountedGroupNorm, CountedLayerNorm, CountedRMSNorm
from ..dims import Dim, Product, fresh, unify
from ..rule_registry import Dims, Typing, module_rule, rule


def _per_channel(x: Dims, tensors: list[Dims]) -> Dims:
    for dims in tensors:
        if dims:
            unify(x[1], dims[0])
    return x


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training")
def batch_norm(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x = t.of(a["input"])
    if a.get("training") or a.get("use_input_stats"):  # a weight standardised by a call, say
        t.statistic(node, x[2:] if "use_input_stats" in a else (x[0], *x[2:]))
    named = [a.get(n) for n in ("weight", "bias", "running_mean", "running_var")]
    return _per_channel(t.of(a["input"]), [t.of(n) for n in named])


@module_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm_module(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    return _per_channel(t.of(a["input"]), _own(t, a, "weight", "bias", "running_mean", "running_var"))


def _own(t: Typing, a: dict[str, Any], *names: str) -> list[Dims]:
    have = [n for n in names if getattr(a["module"], n, None) is not None]
    return [t.param(f"{a['name']}.{n}") for n in have]


def _over_last(t: Typing, node: fx.Node, x: Dims, shape: Any, tensors: list[Dims]) -> Dims:
    normed: tuple[Dim, ...] = x[len(x) - len(shape) :]
    for dims in tensors:
        for have, want in zip(normed, dims, strict=True):
            unify(have, want)
    t.statistic(node, normed)
    return x


@rule("layer_norm", "rms_norm")
def layer_norm(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    tensors = [d for d in (t.of(a.get("weight")), t.of(a.get("bias"))) if d]
    return _over_last(t, node, t.of(a["input"]), a["normalized_shape"], tensors)


@module_rule(nn.LayerNorm, nn.RMSNorm, CountedLayerNorm, CountedRMSNorm)
def layer_norm_module(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    x = t.of(a["input"])
    for rest in _own(t, a, "rest_sum", "rest_squares"):
        for have, want in zip(x, rest, strict=True):
            if want.size > 1:
                unify(have, want)
    return _over_last(t, node, x, a["module"].normalized_shape, _own(t, a, "weight", "bias"))


def _in_groups(t: Typing, node: fx.Node, x: Dims, groups: int, tensors: list[Dims]) -> Dims:
    """x[1] = groups * c: a whole group may go; within one, the mean runs over c and the other dims."""
    t.groups[node], inner = fresh(groups), fresh(x[1].size // groups)
    unify(x[1], Product((t.groups[node], inner)))
    t.statistic(node, (inner, *x[2:]))
    return _per_channel(x, tensors)


@rule("group_norm")
def group_norm(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    tensors = [t.of(a.get("weight")), t.of(a.get("bias"))]
    return _in_groups(t, node, t.of(a["input"]), a["num_groups"], tensors)


@module_rule(nn.GroupNorm, CountedGroupNorm)
def group_norm_module(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    return _in_groups(t, node, t.of(a["input"]), a["module"].num_groups, _own(t, a, "weight", "bias"))
