"""Group lasso: a penalty on the norms of whole groups of weights, which drives groups to zero.

    penalty   lambda * sum_g sqrt|g| * ||w_g||                                  Yuan & Lin, JRSS B 2006, equation 2.2
    step t    w_g <- w_g * max(0, 1 - t * lambda * sqrt|g| / ||w_g||)           its proximal operator: exact zeros

Wen et al., NeurIPS 2016, sections 3.1 and 3.2 (filters, channels, shapes, layers), and ICLR 2018, section 3 (hidden
states). Groups overlap - a weight is in the group of its row and of its column - and a weight is scaled by each of its
groups; it is zero as soon as one of them is. |g| and ||w_g|| are summed over the slices of a group, as every importance
is: where two slices of one group cross (a hidden state's rows and columns), the crossing counts twice.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from math import prod

import torch
from torch import Tensor, nn

from ...passes.axes.axes import Axes, Axis
from .groups import AXES, Groups, Link, find_groups


class GroupLasso:
    """Group lasso over the parameters of a captured model, all groups at once.

    Each parameter is squared once and read or scaled along its groups; the norms of all groups are one vector.

    Kinds of groups, to be combined freely:

    - "axes": every index of every axis that can shrink, with everything that goes with it; or only the axes of a kind:
      "channels", "heads", "head dims", "hidden states", "neurons", "embedding columns", "residual width" ... Once zero,
      such a group can be taken out of the model: nothing else reads or writes its index.
    - "layers": every residual branch. Once zero, it can be taken out: what is left is the shortcut.
    - "filters": one row of one weight. The index that it computes still carries the bias, and the scale and shift of a
      norm behind it. It can go once all rows that write the index are zero and those constants are folded into the next
      layer's bias (`shrink(exact=True)`), which is possible where they are the same at every position: not before a
      convolution with zero padding, whose borders see another constant.
    - "columns": one input channel of one weight. Other layers may still read that channel, so that only this weight
      could skip it, by selecting its inputs; it can go once every reader's column is zero.
    - "shapes": one position of a filter across all filters, a column of the im2col matrix; "tiles": `tile` x `tile`
      blocks of the matrix. The weight stays a dense tensor of the same shape; such zeros help sparse kernels only.

    `live` tells apart what is zero; `surgery` takes out what can go.

    Args:
        axes: of the captured model whose parameters are trained; made anew when the model changes its shape.
        candidates: the axes and branches that may go; None = all that can.

    Raises:
        RequestError: an unknown kind, or no such groups in the model.
    """

    def __init__(
        self, axes: Axes, kinds: Sequence[str] = (AXES,), *, candidates: Iterable[Axis] | None = None, tile: int = 8
    ) -> None:
        self.groups: Groups = find_groups(axes, kinds, axes.prunable if candidates is None else candidates, tile)
        links = sorted(self.groups.links, key=lambda link: (link.parameter, link.view))
        self._links = [list(found) for _, found in groupby(links, key=lambda link: (link.parameter, link.view))]
        named = dict(axes.types.gm.named_parameters())
        self._parameters = [named[same[0].parameter] for same in self._links]
        self._ids = torch.cat([link.ids.flatten() for same in self._links for link in same])
        sizes = self._sums([p.new_ones(same[0].view, dtype=torch.float32)] for p, same in self._divided())
        least = 1 if self._ids.is_cpu else 0  # a GPU takes parameters whole
        piece = max(_PIECE, *(prod(link.view[least:]) for link in self.groups.links))
        self._scratch = torch.empty(piece, device=self._ids.device)
        self.sizes = sizes[:-1]  # (groups,), how many weights
        self.weights = self.sizes.sqrt()  # (groups,), of each group in the penalty
        self._weights = torch.cat([self.weights, sizes.new_zeros(1)])
        self._held, self._holding = torch.zeros_like(sizes, dtype=torch.bool), False

    def __len__(self) -> int:
        return self.groups.count

    @torch.no_grad()
    def norms(self) -> Tensor:
        """||w_g|| of every group: (groups,) float32."""
        return self._norms(self._squares())[:-1]

    @property
    def live(self) -> Tensor:
        """Which groups are not zero: (groups,) bool."""
        return self.norms() > 0

    def penalty(self) -> Tensor:
        """sum_g sqrt|g| ||w_g||, a scalar with gradients; times lambda, it is added to the loss."""
        whole = ([p.float().square().view(same[0].view)] for p, same in self._divided())
        return (self._weights * self._norms(whole)).sum()

    @torch.no_grad()
    def proximal_(self, step: float) -> Tensor:
        """Shrinks every group by `step` = learning rate * lambda, in place, after a step of any optimiser.

        Returns which groups it made zero, (groups,) bool.
        """
        factors = torch.ones_like(self._weights)
        if step:
            factors -= step * self._weights / self._norms(self._squares()).clamp(min=_TINY)
        elif not self._holding:
            return self._held[:-1]
        factors.clamp_(min=0).masked_fill_(self._held, 0)
        along = iter(factors[self._ids].split([link.ids.numel() for same in self._links for link in same]))
        for parameter, same in self._divided():
            view = parameter.view(same[0].view)
            scales: dict[tuple[int, ...], Tensor] = {}
            for link in same:
                scale = next(along).view([n if dim in link.dims else 1 for dim, n in enumerate(view.shape)])
                scales[link.dims] = scales[link.dims] * scale if link.dims in scales else scale
            rows = self._rows(view)
            for at in range(0, len(view), rows):
                for scale in scales.values():  # one after the other while the piece is in the cache
                    view[at : at + rows].mul_(scale[at : at + rows] if len(scale) > 1 else scale)
        return factors[:-1] == 0

    def hold(self, zero: Tensor, pull: Tensor) -> None:
        """From now on the groups in `zero`, (groups,) bool, stay zero, and the lambdas of the others are multiplied by
        `pull`, (groups,): adaptive weights, Wang & Leng, Comput. Stat. Data Anal. 2008."""
        self._held[:-1] = zero
        self._holding = bool(zero.any())
        self._weights[:-1] = self.weights * pull

    def _divided(self) -> Iterator[tuple[nn.Parameter, list[Link]]]:
        """Each parameter and its links in one view; again with those in another."""
        return zip(self._parameters, self._links, strict=True)

    def _squares(self) -> Iterator[Iterator[Tensor]]:
        """Each parameter's squares, in pieces that stay in the cache, all in the same memory."""
        for parameter, same in self._divided():
            view = parameter.view(same[0].view)
            pieces = view.split(self._rows(view))
            yield (torch.mul(x, x, out=self._scratch[: x.numel()].view_as(x)) for x in pieces)

    def _rows(self, view: Tensor) -> int:
        """How many make up a piece."""
        return max(1, len(self._scratch) * len(view) // view.numel())

    def _norms(self, squares: Iterable[Iterable[Tensor]]) -> Tensor:
        """With one more entry for what is in no group."""
        sums = self._sums(squares)
        return sums.clamp(min=_TINY**2).sqrt() * (sums > 0)  # the root has no slope at zero

    def _sums(self, values: Iterable[Iterable[Tensor]]) -> Tensor:
        """The sum over each group, of what stands in place of the parameters, piece by piece along their first dim."""
        parts = [part for pieces, same in zip(values, self._links, strict=True) for part in _sums_along(pieces, same)]
        return torch.zeros(len(self) + 1, device=self._ids.device).index_add(0, self._ids, torch.cat(parts))


_TINY = 1e-18
_PIECE = 1 << 17  # numbers


def _sums_along(pieces: Iterable[Tensor], links: Sequence[Link]) -> Iterator[Tensor]:
    """The sums of a parameter's entries along each of its links, flat; what no link divides is summed first."""
    divided = sorted({dim for link in links for dim in link.dims})
    sums: dict[tuple[int, ...], list[Tensor]] = {link.dims: [] for link in links}
    for piece in pieces:
        others = [dim for dim in range(piece.dim()) if dim not in divided]
        rest = piece.sum(others) if others else piece
        for dims, found in sums.items():
            across = [at for at, dim in enumerate(divided) if dim not in dims]
            found.append(rest.sum(across) if across else rest.clone())  # the memory of a piece is used again
    whole = {dims: torch.cat(found) if 0 in dims else torch.stack(found).sum(0) for dims, found in sums.items()}
    yield from (whole[link.dims].flatten() for link in links)
