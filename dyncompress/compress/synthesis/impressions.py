"""Class impressions: inputs that a trained network describes itself, to distil its exits on where the data are gone.

An input x is moved from noise until the network p answers a class c with it, all classes in turn:

    minimise over x    CE(c, p(x)) + b B(x) + v V(x)

B, where the network has batch norms: how far the batch is from their statistics (`norm_statistics`). V, where inputs
are images: the mean absolute difference of neighbouring pixels. (Zero-shot KD, Nayak et al., ICML 2019; DeepInversion,
Yin et al., CVPR 2020.) Zero-shot KD's targets between classes teach exits less: few data lie there. L-BFGS comes three
times as near to the statistics as Adam in as many steps, whose own noise stays in the first layers' features.

A batch depends on its number and the seed alone, so that an interrupted run resumes exactly.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from tqdm import tqdm

from ...errors import RequestError
from ...passes.graph.copying import deep_copy
from ...passes.graph.inputs import Inputs
from ..options.method_options import Samples
from ..options.training_options import Run
from ..training.batches import call
from ..training.losses import logits_of
from ..training.store import Store, read_state
from .norm_statistics import mismatches

FILE = "impressions.pt"

_HELD = ("batches",)
_IMAGE_BATCH_DIMS = 4  # (batch, channels, height, width)
_START = 0.3  # the deviation of the noise
_HISTORY = 10  # of L-BFGS, twice as many copies of a batch


@dataclass(frozen=True)
class Synthesis:
    """How impressions are made.

    count: how many. batch_size: how many at once; a batch as a whole keeps to the statistics. steps: calls of the
    network per batch, about as many as steps of L-BFGS. batch_norm, variation: the weights b and v.
    """

    count: int = Samples.impressions
    batch_size: int = 128
    steps: int = 240
    batch_norm: float = 10.0
    variation: float = 1.0


@dataclass(frozen=True)
class Impressions:
    """inputs (N, ...) float32, on the CPU; the classes (N,) that they were asked for."""

    inputs: Tensor
    classes: Tensor


def make_impressions(
    model: fx.GraphModule,
    example_inputs: Inputs,
    how: Synthesis | None = None,
    *,
    run: Run = Run(),
    mixed_precision: str | None = None,
) -> Impressions:
    """Impressions of a captured classifier, which stays as it is.

    Args:
        example_inputs: one call's inputs: a float tensor, batch first, alone or in a tuple or dict.
        how: None = the defaults.
        run: every batch is saved in `impressions.pt` in its run_dir; on the CPU by default.
        mixed_precision: "bf16": the model answers in it; else in the precision of its weights.

    Raises:
        RequestError: the model takes more than one tensor or no floats, or answers with anything but finite (batch,
            classes) logits of two or more classes; run_dir holds other impressions.
    """
    how = how or Synthesis()
    shape = check_inputs(example_inputs)
    subject = _Subject(model, example_inputs, torch.device(run.device or "cpu"), mixed_precision)
    settings = {**asdict(how), "seed": run.seed, "shape": list(shape)}
    store = Store(run.run_dir, FILE, settings, resume=run.resume, holds=_HELD)
    made: list[tuple[Tensor, Tensor]] = list(store.saved["batches"]) if store.saved is not None else []
    classes = subject.classes(shape)
    batches = math.ceil(how.count / how.batch_size)
    bar = tqdm(
        total=batches * how.steps, initial=len(made) * how.steps,
        desc="impressions", unit="step", file=sys.stderr, disable=not run.shows_progress,
    )  # fmt: skip
    with bar:
        while len(made) < batches:
            wanted = (torch.arange(how.batch_size) + len(made) * how.batch_size) % classes
            noise = _START * torch.randn(how.batch_size, *shape, generator=_random(run.seed, len(made) + 1))
            made.append((_answering(subject, noise, wanted, how, bar), wanted))
            store.save({"batches": made})
    return Impressions(*(x[: how.count] for x in _joined(made)))


def read_impressions(path: Path) -> Impressions:
    """All that a run has made and saved. Raises RequestError for a damaged file."""
    return Impressions(*_joined(read_state(path, _HELD)["batches"]))


def _joined(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    return (torch.cat(column) for column in zip(*batches, strict=True))


def _answering(subject: "_Subject", start: Tensor, classes: Tensor, how: Synthesis, bar: "tqdm[Any]") -> Tensor:
    """Inputs (B, ...), on the CPU, that were moved from `start` until the network answers the classes (B,)."""
    x, wanted = start.to(subject.device).requires_grad_(), classes.to(subject.device)
    optimizer = torch.optim.LBFGS(
        [x], max_iter=how.steps, max_eval=how.steps, history_size=_HISTORY, line_search_fn="strong_wolfe"
    )
    begun = bar.n

    def loss() -> Tensor:
        logits, mismatch = subject(x)
        found = F.cross_entropy(logits, wanted) + how.batch_norm * mismatch
        if x.dim() == _IMAGE_BATCH_DIMS:
            found = found + how.variation * total_variation(x)
        optimizer.zero_grad()
        found.backward()
        bar.set_postfix(loss=f"{found.item():.3f}", refresh=False)
        bar.update(min(1, begun + how.steps - bar.n))
        return found

    optimizer.step(loss)
    bar.update(begun + how.steps - bar.n)  # it may arrive early
    return x.detach().cpu()


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours along the last two dims, the sum of both."""
    return x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()


def check_inputs(example_inputs: Inputs) -> tuple[int, ...]:
    """The shape of one sample. Raises RequestError for inputs that cannot be synthesised."""
    leaves = [leaf for leaf in pytree.tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    if len(leaves) != 1:
        raise RequestError(
            f"without data, inputs are synthesised for models of one tensor, not of {len(leaves)}: give data"
        )
    if not leaves[0].is_floating_point():
        raise RequestError(
            f"without data, inputs are found by gradients, and {leaves[0].dtype} inputs such as token ids have none: "
            "give data (--data SOURCE)"
        )
    return tuple(leaves[0].shape[1:])


class _Subject:
    """The network as a function of a batch: its logits, and how far the batch is from its batch norms' statistics."""

    def __init__(
        self, model: fx.GraphModule, example_inputs: Inputs, device: torch.device, mixed_precision: str | None
    ) -> None:
        self.device, self.in_bf16 = device, mixed_precision == "bf16"
        self.structure = pytree.tree_structure(example_inputs)
        self.network = deep_copy(model).to(device).eval().requires_grad_(False)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C) logits and the mean mismatch, a scalar; 0 without batch norms."""
        # cuDNN's recurrent layers have no backward pass in evaluation mode
        with mismatches(self.network) as found, torch.backends.cudnn.flags(enabled=False):
            logits = self._logits(x)
        return logits, torch.stack(found).mean() if found else torch.zeros((), device=self.device)

    @torch.no_grad()
    def classes(self, shape: tuple[int, ...]) -> int:
        """How many the network knows. Raises RequestError for answers that are not of two or more, or not finite."""
        logits = self._logits(torch.zeros(2, *shape, device=self.device))
        if not logits.isfinite().all():
            raise RequestError(
                "without data, inputs are found by the model's answers, and they are not finite: mend it"
            )
        if logits.dim() != 2 or logits.shape[1] < 2:
            answer = "x".join(map(str, logits.shape[1:]))
            raise RequestError(
                f"without data, inputs are synthesised by class, and the model answers {answer} per sample: give data"
            )
        return logits.shape[1]

    def _logits(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bf16):
            return logits_of(call(self.network, pytree.tree_unflatten([x], self.structure))).float()


def _random(seed: int, number: int) -> torch.Generator:
    """Random numbers of one batch."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))
