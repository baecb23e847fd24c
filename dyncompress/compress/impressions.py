"""Class impressions: inputs that a trained network describes itself, to distil its exits on where the data are gone.

A target y is drawn around a class c, and an input x is moved from noise until the network p answers it:

    y ~ Dirichlet(beta s_c)        s_c: how alike c and every class are, 0..1; beta 1 or 0.1, each for half the targets
    minimise over x                CE(y, p(x)) + b B(x) + v V(x)

B, where the network has batch norms: how far the batch is from their statistics (`norm_statistics`). V, where inputs
are images: the mean absolute difference of neighbouring pixels. (Zero-shot KD, Nayak et al., ICML 2019; DeepInversion,
Yin et al., CVPR 2020.)

A batch depends on its number and the seed alone, so that an interrupted run resumes exactly.
"""

import math
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from tqdm import tqdm

from ..errors import RequestError
from ..passes.capture import Inputs
from ..passes.copying import deep_copy
from .batches import call
from .impression_store import ImpressionStore
from .losses import logits_of
from .norm_statistics import mismatches

_IMAGE_BATCH_DIMS = 4  # (batch, channels, height, width)
_BETAS = (1.0, 0.1)
_LEAST_ALIKE = 0.01  # a Dirichlet's concentrations are positive


@dataclass(frozen=True)
class Synthesis:
    """How impressions are made.

    count: how many. batch_size: how many at once; a batch as a whole keeps to the statistics. steps: of Adam.
    lr: Adam's at first, in units of the inputs; it falls as a cosine. batch_norm, variation: the weights b and v.
    """

    count: int = 1024
    batch_size: int = 128
    steps: int = 60
    lr: float = 0.2
    batch_norm: float = 10.0
    variation: float = 1.0


@dataclass(frozen=True)
class Impressions:
    """inputs (N, ...) float32, on the CPU; the classes (N,) and targets (N, C) that they were asked for."""

    inputs: Tensor
    classes: Tensor
    targets: Tensor


def make_impressions(
    model: fx.GraphModule,
    example_inputs: Inputs,
    how: Synthesis | None = None,
    *,
    seed: int = 0,
    mixed_precision: str | None = None,
    device: torch.device | str = "cpu",
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Impressions:
    """Impressions of a captured classifier, which stays as it is.

    Args:
        example_inputs: one call's inputs: a float tensor, batch first, alone or in a tuple or dict.
        how: None = the defaults.
        mixed_precision: "bf16": the model answers in it; else in the precision of its weights.
        run_dir: where every batch is saved, in `impressions.pt`; resume: go on there.

    Raises:
        RequestError: the model takes more than one tensor or no floats, or answers with anything but (batch, classes)
            logits of two or more classes; run_dir holds other impressions.
    """
    how = how or Synthesis()
    shape = check_inputs(example_inputs)
    subject = _Subject(model, example_inputs, torch.device(device), mixed_precision)
    store = ImpressionStore(run_dir, {**asdict(how), "seed": seed, "shape": list(shape)}, resume)
    made = store.saved
    similarity = class_similarity(subject.answers_to_noise(shape, _random(seed, 0)))
    batches = math.ceil(how.count / how.batch_size)
    bar = tqdm(
        total=batches * how.steps, initial=len(made) * how.steps,
        desc="impressions", unit="step", file=sys.stderr, disable=not progress,
    )  # fmt: skip
    with bar:
        while len(made) < batches:
            random = _random(seed, len(made) + 1)
            classes = (torch.arange(how.batch_size) + len(made) * how.batch_size) % len(similarity)
            targets = draw_targets(similarity, classes, random)
            noise = torch.randn(how.batch_size, *shape, generator=random)
            made.append((_answering(subject, noise, targets, how, bar), classes, targets))
            store.save(made)
    return Impressions(*(torch.cat(column)[: how.count] for column in zip(*made, strict=True)))


def _answering(subject: "_Subject", start: Tensor, targets: Tensor, how: Synthesis, bar: "tqdm[Any]") -> Tensor:
    """Inputs (B, ...), on the CPU, that were moved from `start` until the network answers the targets (B, C)."""
    x, wanted = start.to(subject.device).requires_grad_(), targets.to(subject.device)
    optimizer = torch.optim.Adam([x], lr=how.lr)
    for step in range(how.steps):
        optimizer.param_groups[0]["lr"] = 0.5 * how.lr * (1 + math.cos(math.pi * step / how.steps))
        logits, mismatch = subject(x)
        loss = F.cross_entropy(logits, wanted) + how.batch_norm * mismatch
        if x.dim() == _IMAGE_BATCH_DIMS:
            loss = loss + how.variation * total_variation(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return x.detach().cpu()


def class_similarity(logits: Tensor) -> Tensor:
    """How alike classes are, (C, C) in 0.01..1: the correlation of their (N, C) logits, each row from its least to 1.

    The rows of the last layer, which zero-shot KD compares, need not exist in a captured graph; answers do.
    """
    correlation = torch.corrcoef(logits.double().T).nan_to_num(0.0)  # a logit that never changes is like no other
    correlation.fill_diagonal_(1.0)
    least = correlation.amin(1, keepdim=True)
    return ((correlation - least) / (1 - least).clamp_min(1e-9)).clamp_min(_LEAST_ALIKE).fill_diagonal_(1.0).float()


def draw_targets(similarity: Tensor, classes: Tensor, random: torch.Generator) -> Tensor:
    """A target (N, C) around each of the classes (N,): Dirichlet with concentrations beta times the class's row."""
    beta = torch.tensor(_BETAS)[torch.randint(len(_BETAS), (len(classes), 1), generator=random)]
    return dirichlet(beta * similarity[classes], random)


def dirichlet(concentration: Tensor, random: torch.Generator) -> Tensor:
    """One draw per row of the positive concentrations (N, C): gamma variates over their sum."""
    numbers = np.random.default_rng(int(torch.randint(2**62, (), generator=random)))
    rows = [numbers.dirichlet(row) for row in concentration.double().numpy()]
    return torch.from_numpy(np.stack(rows)).float()


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
    def answers_to_noise(self, shape: tuple[int, ...], random: torch.Generator, count: int = 256) -> Tensor:
        """Logits (count, C) of unit noise. Raises RequestError for answers that are not of two or more classes."""
        logits = self._logits(torch.randn(count, *shape, generator=random).to(self.device)).cpu()
        if logits.dim() != 2 or logits.shape[1] < 2:
            answer = "x".join(map(str, logits.shape[1:]))
            raise RequestError(
                f"without data, inputs are synthesised by class, and the model answers {answer} per sample: give data"
            )
        return logits

    def _logits(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bf16):
            return logits_of(call(self.network, pytree.tree_unflatten([x], self.structure))).float()


def _random(seed: int, number: int) -> torch.Generator:
    """Random numbers of one batch."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))
