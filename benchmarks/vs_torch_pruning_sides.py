"""Both libraries behind one interface: halve every axis that can shrink, and hold the result to the masked original.

Ours            capture + infer_axes + l2_scores + shrink_axes of every prunable axis to its better half, like `prune`.
Torch-Pruning   its documented high-level use: BasePruner with MagnitudeImportance(p=2), pruning_ratio=0.5, the final
                classifier ignored, no per-model hints; then one step().

The masked original holds a zero wherever an element was removed. A norm over a shrunk axis makes the two differ for a
reason that is no mistake, so each side is compared at one count of what the norm averages over: ours with
`shrink(exact=True)`, which keeps the old count; Torch-Pruning's against masked norms that see the kept channels only.
"""

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from model_list import call, tensors
from torch import Tensor, fx, nn

from dyncompress.compress.importance.scores import l2_scores
from dyncompress.passes.axes.axes import as_keep, infer_axes
from dyncompress.passes.capture.capture import capture
from dyncompress.passes.shrink.shrink import mask, shrink, shrink_axes

Stage = Callable[[str], None]
Seconds = dict[str, float]


class Unknown(Exception):
    """The oracle cannot be had; the message says why."""


@contextmanager
def _timed(seconds: Seconds, part: str, stage: Stage) -> Iterator[None]:
    """Seconds on the processor: with one thread those of the clock, but blind to what else the machine does."""
    stage(part)
    begin = time.process_time()
    yield
    seconds[part] = time.process_time() - begin


class Ours:
    """dyncompress."""

    def halve(self, model: nn.Module, inputs: Any, seconds: Seconds, stage: Stage) -> nn.Module:
        """A model with half of every prunable axis; notes the seconds of each part."""
        with _timed(seconds, "capture", stage):
            gm = capture(model, inputs)
        with _timed(seconds, "typing", stage):
            axes = infer_axes(gm)
        with _timed(seconds, "score", stage):
            keep = _better_half(gm, axes.prunable)
        with _timed(seconds, "shrink", stage):
            return shrink_axes(axes, as_keep(axes, keep))

    def masked_and_small(self, model: nn.Module, inputs: Any) -> tuple[nn.Module, nn.Module]:
        """The masked original and the shrunk model, both with the old counts in norms."""
        gm = capture(model, inputs)
        keep = _better_half(gm, infer_axes(gm).prunable)
        return mask(gm, keep), shrink(gm, keep, exact=True)


def _better_half(gm: fx.GraphModule, axes: list[Any]) -> dict[str, Tensor]:
    scores = l2_scores(gm, [axis for axis in axes if axis.size > 1])
    return {name: score.topk((len(score) + 1) // 2).indices for name, score in scores.items()}


class TorchPruning:
    """torch_pruning 1.6.1, `pip install --no-deps torch-pruning==1.6.1`."""

    def halve(self, model: nn.Module, inputs: Any, seconds: Seconds, stage: Stage) -> nn.Module:
        """`model` itself, pruned in place; notes the seconds of each part."""
        ignored = _classifiers(model, inputs)
        with _timed(seconds, "construct", stage):
            pruner = _pruner(model, inputs, ignored)
        with _timed(seconds, "step", stage):
            pruner.step()
        return model

    def masked_and_small(self, model: nn.Module, inputs: Any) -> tuple[nn.Module, nn.Module]:
        """The masked original, norms over kept channels only, and the pruned model."""
        small = copy.deepcopy(model)
        pruner = _pruner(small, inputs, _classifiers(small, inputs))
        _number_elements(small)
        pruner.step()
        return _masked_like(model, small), small


def _pruner(model: nn.Module, inputs: Any, ignored: list[nn.Module]) -> Any:
    import torch_pruning as tp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.pruner.BasePruner(
            model,
            inputs,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=ignored,
            output_transform=lambda out: [t for t in tensors(out) if t.requires_grad],
        )


def _classifiers(model: nn.Module, inputs: Any) -> list[nn.Module]:
    """Layers as wide as the output, the rule of Torch-Pruning's README (`m.out_features == 1000`); some are
    convolutions."""
    widths = {d for t in call(model, inputs) for d in (t.shape[1], t.shape[-1]) if t.dim() > 1}
    return [
        m
        for m in model.modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and getattr(m, "out_features", getattr(m, "out_channels", 0)) in widths
    ]


def _number_elements(model: nn.Module) -> None:
    """Numbers every parameter's elements in its `.grad`, which Torch-Pruning slices along with the parameter: after the
    step the numbers tell what is left, whatever the pruner did."""
    for name, p in model.named_parameters():
        exact = 2**53 if p.dtype == torch.float64 else 2**24
        if p.numel() > exact:
            raise Unknown(f"{name} has more elements than {p.dtype} can number")
        p.grad = torch.arange(p.numel(), dtype=p.dtype).view_as(p)


def _masked_like(model: nn.Module, small: nn.Module) -> nn.Module:
    """A copy of `model` with zeros where `small` has lost elements."""
    masked = copy.deepcopy(model)
    survivors = dict(small.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, p in masked.named_parameters(remove_duplicate=False):
            numbers = survivors[name].grad
            if numbers is None:
                raise Unknown(f"{name} was replaced by a new parameter")
            stays = torch.zeros(p.numel(), dtype=p.dtype)
            stays[numbers.flatten().long()] = 1
            p.mul_(stays.view_as(p))
    for path, module in list(model.named_modules()):
        if _averages_over_channels(module) and _shrunk(module, small.get_submodule(path)):
            parent, _, name = path.rpartition(".")
            setattr(masked.get_submodule(parent), name, KeptNorm(module, small.get_submodule(path)))
    return masked


def _averages_over_channels(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    if "std" in kind and isinstance(module, nn.Conv2d):
        raise Unknown("standardised weights: their statistics run over removed inputs")
    container = next(module.children(), None) is not None
    return "norm" in kind and not container and not isinstance(module, nn.modules.batchnorm._NormBase)


def _shrunk(module: nn.Module, small: nn.Module) -> bool:
    own, left = (dict(m.named_parameters(recurse=False)) for m in (module, small))
    if not own and str(module) != str(small):
        raise Unknown(f"{type(module).__name__} has no weight that tells which channels are left")
    return any(own[name].shape != left[name].shape for name in own)


class KeptNorm(nn.Module):
    """A norm in a masked model that takes its statistics over the kept channels; the others are zero."""

    def __init__(self, original: nn.Module, small: nn.Module) -> None:
        super().__init__()
        weight, width = next(small.parameters(recurse=False)), next(original.parameters(recurse=False)).numel()
        assert weight.grad is not None
        self.small, self.kept, self.width = small, weight.grad.flatten().long(), width
        first = isinstance(original, nn.GroupNorm) or type(original).__name__.endswith("2d")
        self.dim = getattr(original, "channel_dim", 1 if first else -1)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as the original's output."""
        out = self.small(x.index_select(self.dim, self.kept))
        shape = list(x.shape)
        shape[self.dim] = self.width
        return out.new_zeros(shape).index_copy(self.dim, self.kept, out)


SIDES: dict[str, Ours | TorchPruning] = {"ours": Ours(), "torch_pruning": TorchPruning()}
