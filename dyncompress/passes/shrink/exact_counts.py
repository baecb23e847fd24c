"""Exact mode of shrinking: statistics over a shrunk axis keep the old count, as if what was removed were masked.

What is masked is zero, as a rule; where a layer that mixes tokens adds its bias to it (MLP-Mixers), it is a constant,
and the norm keeps its sums.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from ...errors import RequestError
from ..dims.dims import Atom, Dim, new_size
from ..dims.rule_registry import Typing
from ..graph.nodes import op_name
from ..modules.counted_norms import CountedGroupNorm, CountedLayerNorm, CountedRMSNorm
from .counted_statistics import count_op, rescale
from .fold_constants import masked_rests
from .plan import Plan

Twins = list[tuple[fx.Node, fx.Node]]


def keep_counts(types: Typing, small: fx.GraphModule, twins: Twins, scheme: Plan, keep: Mapping[Atom, Tensor]) -> None:
    """Replaces the norms and rescales the means of `small` that average over a shrunk dim.

    Raises:
        RequestError: a statistic that has no exact form here (a variance computed by an operator, say).
    """
    shrunk = {s.node for s in types.statistics if new_size(s.dim, keep) != s.dim.size}
    rests = masked_rests(types, scheme, keep, shrunk) if shrunk else {}
    for old, new in twins:
        if old.name not in shrunk:
            continue
        if old.op == "call_module":
            _replace_norm(types, small, old, rests.get(old))
        elif op_name(old) == "mean":
            rescale(new, math.prod(new_size(dim, keep) / dim.size for dim in _averaged(types, old)))
        elif op_name(old) not in _NOT_AVERAGED and not count_op(old, new, _averaged(types, old)):
            raise RequestError(f"exact=True cannot keep the count of {old.name} ({op_name(old)}); use exact=False")


_NOT_AVERAGED = {"sum", "linalg_vector_norm", "norm"}


def _averaged(types: Typing, node: fx.Node) -> list[Dim]:
    """All dims that a call averages over, shrunk or not."""
    return [statistic.dim for statistic in types.statistics if statistic.node == node.name]


def _replace_norm(types: Typing, small: fx.GraphModule, old: fx.Node, rest: Tensor | None) -> None:
    path = str(old.target)
    before: Any = types.gm.get_submodule(path)
    now: Any = small.get_submodule(path)
    if isinstance(now, CountedGroupNorm | CountedLayerNorm | CountedRMSNorm):
        _add_rest(now, rest)
        return
    if not isinstance(before, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
        raise RequestError(f"exact=True cannot keep the count inside {path} ({type(before).__name__}); use exact=False")
    counted = _counted(before, now)
    for name, tensor in now._parameters.items():
        counted._parameters[name] = tensor
    _add_rest(counted, rest)
    small.set_submodule(path, counted.train(now.training))


def _add_rest(norm: Any, rest: Tensor | None) -> None:
    """Notes removed constants, (..., removed), in a norm over the last dim."""
    if rest is None:
        return
    for name, sums in (("rest_sum", rest.sum(-1, keepdim=True)), ("rest_squares", rest.square().sum(-1, keepdim=True))):
        have = getattr(norm, name)
        setattr(norm, name, sums if have is None else have + sums)


def _counted(before: Any, now: Any) -> nn.Module:
    settings: dict[str, Any] = {"eps": now.eps, "weight": now.weight is not None}
    settings["bias"] = getattr(now, "bias", None) is not None
    if isinstance(before, nn.GroupNorm):
        per_group = before.num_channels // before.num_groups
        return CountedGroupNorm([now.num_channels], per_group, **settings, num_groups=now.num_groups)
    kind = CountedLayerNorm if isinstance(before, nn.LayerNorm) else CountedRMSNorm
    return kind(list(now.normalized_shape), math.prod(before.normalized_shape), **settings)
