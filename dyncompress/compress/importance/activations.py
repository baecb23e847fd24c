"""Activation statistics: how strongly each index of an axis is used on data (Molchanov et al., ICLR 2017, section 2.2).

For every tensor computed per sample of which one dim holds the axis, m(i) = mean |a| over samples, places and all other
dims at index i. Values differ in scale, so each m is divided by its mean over the axis:

    activation(i) = mean over tensors of m(i) / mean_j m(j)

A residual branch that makes t of its shortcut a scores mean |t - a| / mean |a|: what it changes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

from ...passes.axes.axes import Axes, Axis, infer_axes
from ...passes.dims.dims import Atom, coordinates, leaves
from ...passes.graph.inputs import flat_inputs, split_inputs
from ..training.batches import device_of_model, in_order, placed, size_of
from .group_sums import Context, Scores, normalised
from .weights import l2_scores


@torch.no_grad()
def activation_scores(gm: fx.GraphModule, axes: Iterable[Axis], context: Context) -> Scores:
    """Mean absolute activation of each index relative to its axis', by axis name; the labels are not used.

    An axis that no value of the graph shows (inside a recurrent stack) takes its L2 norms instead.

    Raises:
        RequestError: no data.
    """
    own, wanted = infer_axes(gm), list(axes)
    data, device = context.drawn(), device_of_model(gm)
    watch = _Watch(gm, own, [own[axis.name] for axis in wanted])
    samples = size_of(data, "importance")
    bar = tqdm(total=samples, desc="importance", unit="sample", leave=False, disable=not context.progress)
    with bar, placed(gm, device):
        gm.eval()
        for inputs, labels in in_order(data, context.batch_size, device):
            args, kwargs = split_inputs(inputs)
            watch.run(*flat_inputs(gm, args, kwargs), enable_io_processing=False)
            bar.update(len(labels))
    scores = {axis.name: watch.score(own[axis.name]) for axis in wanted}
    unseen = l2_scores(gm, [axis for axis in wanted if scores[axis.name] is None])
    return {name: unseen[name] if score is None else score for name, score in scores.items()}


class _Watch(fx.Interpreter):
    """Runs the graph and adds up |a| along the dims that hold one of the axes; by node, so that none is kept."""

    def __init__(self, gm: fx.GraphModule, axes: Axes, wanted: list[Axis]) -> None:
        super().__init__(gm)
        self.axes, self.sums = axes, dict[tuple[fx.Node, int], Tensor]()
        atoms, batch = {axis.atom for axis in wanted}, set(leaves(axes.types.batch))
        self.branches = [axes.branches[atom] for atom in atoms if atom in axes.branches]
        self.shortcuts = dict[str, Tensor]()  # by branch, from where they are computed to where they are added to
        self.changes = {branch.name: torch.zeros(2, dtype=torch.float64) for branch in self.branches}
        self.places: dict[Atom, list[tuple[fx.Node, int, Tensor]]] = {}  # axis -> (node, number of the dim, positions)
        for node in gm.graph.nodes:
            if isinstance(node.meta.get("val"), Tensor) and axes.types.has_batch(node):
                for at, dim in enumerate(axes.types.of(node)):
                    for atom, positions in coordinates(dim):
                        if atom in atoms and batch.isdisjoint(leaves(dim)):  # positions would change with the batch
                            self.places.setdefault(atom, []).append((node, at, positions))
        self.watched: dict[fx.Node, set[int]] = {}
        for node, at, _ in [place for places in self.places.values() for place in places]:
            self.watched.setdefault(node, set()).add(at)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for branch in self.branches:
            if n is branch.shortcut:
                self.shortcuts[branch.name] = result.double().clone()  # a copy: additions may be in place
            elif n is branch.total:
                before = self.shortcuts.pop(branch.name)
                sums = torch.stack([(result - before).abs().sum(), before.abs().sum()])
                self.changes[branch.name] += sums.cpu()
        if n in self.watched and result.is_floating_point():
            for dim in self.watched[n]:
                along = result.abs().movedim(dim, 0).flatten(1).sum(1, dtype=torch.float64).cpu()
                self.sums[n, dim] = self.sums[n, dim] + along if (n, dim) in self.sums else along
        return result

    def score(self, axis: Axis) -> Tensor | None:
        """(axis.size,) float64; None where no value shows the axis."""
        if axis.atom in self.axes.branches:
            change, size = self.changes[self.axes.branches[axis.atom].name]
            return (change / size.clamp_min(torch.finfo(size.dtype).tiny))[None]
        places = [place for place in self.places.get(axis.atom, []) if place[:2] in self.sums]
        if not places:
            return None
        shares = [normalised(self.sums[node, at][positions].sum(1)) for node, at, positions in places]
        return torch.stack(shares).mean(0)
