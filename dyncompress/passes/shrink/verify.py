"""The oracle as a function: where, and by how much, a shrunk model differs from the original, what it lost zeroed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...errors import RequestError
from ..axes.axes import Axes, as_keep, infer_axes
from ..dims.dims import Atom, Dim, kept_indices
from ..graph.inputs import Inputs
from ..graph.meta import is_captured
from ..graph.random_inputs import given_inputs, random_inputs
from ..graph.restoring import evaluating
from .plan import masked_copy, plan_axes
from .shrink import KeepByName

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_BATCH = 3

Values = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """A node at which both differ by `error`: the largest absolute difference over the largest absolute value."""

    node: str
    path: str
    error: float
    note: str = ""

    def __str__(self) -> str:
        where = f"{self.node} (in {self.path})" if self.path else self.node
        return f"{where}: {self.error:.1e}" + (f", {self.note}" if self.note else "")


@dataclass(frozen=True)
class Verification:
    """Whether two models agree: `error` at the outputs, and every node whose values differ, in graph order."""

    ok: bool
    error: float
    tolerance: float
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        if self.ok:
            return f"equal: the outputs differ by {self.error:.1e}, within {self.tolerance:.0e}"
        first = f"; the first difference is at {self.differences[0]}" if self.differences else ""
        return f"different: the outputs differ by {self.error:.1e}, more than {self.tolerance:.0e}{first}"


def verify(
    original: fx.GraphModule,
    small: fx.GraphModule,
    keep: KeepByName,
    inputs: Inputs | None = None,
    *,
    tolerance: float | None = None,
) -> Verification:
    """Holds `small` to `original` with everything that `keep` removes set to zero, node by node, in evaluation mode.

    Args:
        original: the captured model that was shrunk.
        small: what `shrink(original, keep)` made; after training it differs, of course.
        keep: kept indices by axis name, as given to `shrink`.
        inputs: what to compare on, as `capture` takes it; by default three random samples.
        tolerance: largest relative error that counts as equal; by default 1e-9 in float64, 1e-4 in float32.

    Raises:
        RequestError: the names or indices in `keep` are not the original's, or the inputs do not fit.
    """
    if not is_captured(small):
        raise RequestError(f"verify compares captured models; small is a {type(small).__name__}")
    flat = random_inputs(original, _BATCH) if inputs is None else given_inputs(original, inputs, _BATCH)
    axes = infer_axes(original)
    kept = as_keep(axes, keep)
    if tolerance is None:
        dtype = next((p.dtype for p in original.parameters() if p.is_floating_point()), torch.float32)
        tolerance = _TOLERANCES.get(dtype, 1e-4)
    masked = masked_copy(original, plan_axes(axes, kept))
    reference, ours = _Recorder(masked).values(flat), _Recorder(small).values(flat)
    error = _error(reference["output"], ours["output"])
    found = [d for d in _differences(axes, kept, reference, ours) if not d.error <= tolerance]
    return Verification(error <= tolerance, error, tolerance, tuple(found))


def _differences(axes: Axes, keep: dict[Atom, Tensor], reference: Values, ours: Values) -> Iterator[Difference]:
    """Every tensor that both models have, and by how much it differs."""
    averaged = {statistic.node for statistic in axes.types.statistics}
    for node, dims in axes.types.dims.items():
        value, wanted = ours.get(node.name), reference.get(node.name)
        if isinstance(value, Tensor) and isinstance(wanted, Tensor) and len(dims) == wanted.dim():
            note = "a statistic over a shrunk axis: shrink(exact=True) keeps its count" if node.name in averaged else ""
            yield Difference(node.name, str(node.meta.get("path", "")), _error(_slice(wanted, dims, keep), value), note)


def _slice(value: Tensor, dims: tuple[Dim, ...], keep: dict[Atom, Tensor]) -> Tensor:
    for d, dim in enumerate(dims):
        kept = kept_indices(dim, keep)
        if kept is not None:
            value = value.index_select(d, kept.to(value.device))
    return value


def _error(wanted: Any, value: Any) -> float:
    """Largest absolute difference over the largest absolute value of what is wanted; infinite for another shape."""
    pairs = list(zip(pytree.tree_leaves(wanted), pytree.tree_leaves(value), strict=True))
    worst = 0.0
    for a, b in pairs:
        if not isinstance(a, Tensor) or a.numel() == 0:
            continue
        if a.shape != b.shape:
            return math.inf
        gap = (a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30)
        worst = max(worst, math.inf if gap.isnan() else float(gap))
    return worst


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps a copy of every value, as nothing may change it later."""

    def values(self, flat: list[Any]) -> Values:
        self.seen: Values = {}
        with torch.no_grad(), evaluating(self.module):
            self.run(*flat, enable_io_processing=False)
        return self.seen

    def run_node(self, n: fx.Node) -> Any:
        """One node's value."""
        value = super().run_node(n)
        self.seen["output" if n.op == "output" else n.name] = pytree.tree_map_only(Tensor, Tensor.clone, value)
        return value
