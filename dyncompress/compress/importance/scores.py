"""Importance: how much each index of an axis matters, over everything that would go with it.

Each is a function (captured model, axes, context) -> {axis name: scores (size,)}; higher stays longer. The formulas are
in `weights`, `gradients` and `activations`. Any axis can be scored: channels, heads, hidden states, whole branches.
"""

from collections.abc import Callable, Iterable

import torch
from torch import fx

from ...errors import RequestError
from ...passes.axes.axes import Axis
from .activations import activation_scores
from .gradients import hessian_scores, taylor_scores
from .group_sums import Context, Scores, group_sums, normalised
from .weights import bn_scale_scores, geometric_median_scores, l1_scores, l2_scores, lamp_scores, random_scores

Importance = Callable[[fx.GraphModule, Iterable[Axis], Context], Scores]

IMPORTANCES: dict[str, Importance] = {
    "l1": l1_scores,
    "l2": l2_scores,
    "taylor": taylor_scores,
    "hessian": hessian_scores,
    "bn-scale": bn_scale_scores,
    "geometric-median": geometric_median_scores,
    "lamp": lamp_scores,
    "activation": activation_scores,
    "random": random_scores,
}
NEED_DATA = frozenset({"taylor", "hessian", "activation"})
COMPARABLE = frozenset({"lamp"})  # made to be ranked across axes as they are, without dividing by the axis' mean


def check_importance(name: str) -> None:
    """Raises RequestError for an importance that does not exist."""
    if name not in IMPORTANCES:
        raise RequestError(f"unknown importance {name!r}; choose one of {', '.join(IMPORTANCES)}")


def score_axes(gm: fx.GraphModule, axes: Iterable[Axis], importance: str, context: Context) -> Scores:
    """The scores of all `axes` of a captured model, by axis name.

    Raises:
        RequestError: an unknown importance, data missing or unfit, weights that are NaN, infinite or not there.
    """
    check_importance(importance)
    if importance in NEED_DATA and context.data is None:
        raise RequestError(f"importance={importance!r} needs data: a dataset of (input, label)")
    for name, parameter in gm.named_parameters():
        if parameter.is_meta:
            raise RequestError(f"{name} holds no data (it is on the meta device): load the weights before ranking them")
        if not parameter.isfinite().all():
            raise RequestError(f"{name} holds NaN or infinite values: train or load the model again")
    scores = IMPORTANCES[importance](gm, axes, context)
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise RequestError(f"importance={importance!r} is not finite on {name}: look for bad values in the data")
    return scores


__all__ = [
    "COMPARABLE",
    "IMPORTANCES",
    "NEED_DATA",
    "Context",
    "Importance",
    "Scores",
    "bn_scale_scores",
    "check_importance",
    "geometric_median_scores",
    "group_sums",
    "hessian_scores",
    "l1_scores",
    "l2_scores",
    "lamp_scores",
    "normalised",
    "random_scores",
    "score_axes",
    "taylor_scores",
]
