"""A plan: the slices of every tensor for a set of kept indices. It slices anything shaped like the parameters -
weights, gradients, optimiser moments, an averaged copy, shards of a file - and it zeroes what it would remove."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..axes.axes import Axes, as_keep, infer_axes
from ..dims.dims import Dim, kept_indices, new_size, resolve
from ..graph.copying import copy_with
from ..graph.nodes import attribute

Kept = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Plan:
    """Kept indices (None = all) of each dim of each parameter and buffer that shrinks, by name, with its old shape;
    `dropped` names those that go altogether, with their branch."""

    kept: Mapping[str, Kept]
    shapes: Mapping[str, tuple[int, ...]]
    dropped: frozenset[str] = frozenset()

    @property
    def touched(self) -> list[str]:
        """The names of all tensors that change."""
        return [*self.kept, *self.dropped]

    def slice(self, name: str, tensor: Tensor) -> Tensor:
        """The part of `tensor` (shaped like the parameter `name`) that stays; a copy in the same memory format.

        Raises:
            ValueError: the tensor has another shape than the parameter, or nothing of it stays.
        """
        if name in self.dropped:
            raise ValueError(f"nothing of {name} stays: its branch is removed")
        if name not in self.kept:
            return tensor.clone()
        self._check(name, tensor)
        part = tensor
        for dim, kept in enumerate(self.kept[name]):
            if kept is not None:
                part = part.index_select(dim, kept.to(tensor.device))
        return part.contiguous(memory_format=_memory_format(tensor))

    def zero(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of `tensor` with everything that would be removed set to zero."""
        if name in self.dropped:
            return torch.zeros_like(tensor)
        tensor = tensor.clone()
        if name not in self.kept:
            return tensor
        self._check(name, tensor)
        for dim, kept in enumerate(self.kept[name]):
            if kept is not None:
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
                gone[kept.to(tensor.device)] = False
                tensor.index_fill_(dim, gone.nonzero()[:, 0], 0)
        return tensor

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor of a mapping by parameter name (a state dict, the moments of an optimiser), sliced; without
        the dropped ones."""
        return {name: self.slice(name, tensor) for name, tensor in tensors.items() if name not in self.dropped}

    def _check(self, name: str, tensor: Tensor) -> None:
        if tuple(tensor.shape) != self.shapes[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the plan expects {self.shapes[name]}")


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Channels last where the tensor is so and not both: convolutions take three times as long in the other format."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    is_last = last is not None and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous()
    return last if last is not None and is_last else torch.contiguous_format


def masked_copy(gm: fx.GraphModule, scheme: Plan) -> fx.GraphModule:
    """A deep copy of `gm`, everything that the plan removes set to zero."""
    return copy_with(gm, {name: scheme.zero(name, attribute(gm, name).detach()) for name in scheme.touched})


def sliced_copy(gm: fx.GraphModule, scheme: Plan) -> fx.GraphModule:
    """A copy of `gm` in which each tensor that the plan shrinks is already its slice."""
    return copy_with(gm, {name: scheme.slice(name, attribute(gm, name).detach()) for name in scheme.kept})


def plan(gm: fx.GraphModule, keep: Mapping[str, Tensor | Sequence[int]]) -> Plan:
    """The plan that keeps `keep[axis name]` of each named axis and all of the others.

    Raises:
        RequestError: unknown or frozen axis, bad indices.
    """
    axes = infer_axes(gm)
    return plan_axes(axes, as_keep(axes, keep))


def plan_axes(axes: Axes, keep: Mapping) -> Plan:
    """The plan for kept indices by atom."""
    kept, shapes, found = {}, {}, dict[Dim, Tensor | None]()

    def along(dim: Dim) -> Tensor | None:
        if dim not in found:
            found[dim] = kept_indices(dim, keep) if new_size(dim, keep) != dim.size else None
        return found[dim]

    dropped = frozenset(t for atom, branch in axes.branches.items() if atom in keep for t in branch.tensors)
    for name, dims in axes.types.params.items():
        slices = tuple(along(resolve(dim)) for dim in dims)
        if name not in dropped and any(indices is not None for indices in slices):
            kept[name], shapes[name] = slices, tuple(d.size for d in dims)
    return Plan(kept, shapes, dropped)
