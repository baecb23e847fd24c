"""Conversion without data: what the exits are trained on, and what their thresholds are chosen on, are impressions.

A trained network is surer of an impression, which is one of its ideas of a class, than of data, and less sure of a
blend of two. Thresholds are chosen on as many of the one as of the other, and are one number for all exits: a search
for each would fit what exits do on impressions, which early ones answer far better than data.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from ...errors import RequestError
from ...passes.graph.inputs import Inputs
from ..options.choices import WITHOUT_LABELS, Precision
from ..options.steps import Convert
from ..options.training_options import Run
from ..training.batches import LabelledData, call, placed
from ..training.losses import logits_of
from .few_samples import EPOCH, Blends
from .impressions import Synthesis, make_impressions

HELD_OUT = 0.2  # of the impressions: the last ones, for temperatures and thresholds
_TIMES = 4  # that each of those is shown as it is, and blended with another: every time shifted, where it is an image
_EPOCH = 2 * EPOCH  # blends that are one pass of training

COST = (
    "convert without data: exits are trained, and thresholds chosen, on inputs synthesised out of the model; on real "
    "data expect less accuracy than with data, and another mean cost than a budget allows; max_loss, macs and the "
    "accuracies reported are no guarantees"
)


def check_without_data(asked: Convert) -> None:
    """Raises RequestError for what cannot be done without data."""
    recipe, shots = asked.recipe, asked.samples.shots
    if asked.leaving.risk is not None:
        raise RequestError("a risk is promised for data like the calibration split: without data there is no promise")
    if shots is not None:
        raise RequestError(f"shots={shots} labelled samples per class are taken from the data: give data")
    if recipe not in WITHOUT_LABELS:
        raise RequestError(f"recipe={recipe!r} learns from labels: without data use one of {', '.join(WITHOUT_LABELS)}")
    if not asked.freeze_trunk:
        raise RequestError("without data there are no labels to train the trunk on: leave it frozen")


def splits_of_impressions(
    model: fx.GraphModule,
    example_inputs: Inputs,
    count: int,
    run: Run,
    mixed_precision: Precision | None = None,
) -> tuple[LabelledData, LabelledData]:
    """Training data, unlabelled blends of impressions, and calibration data: others, labelled with the model's answers.

    Args:
        model: captured. count: how many impressions. The rest are those of `make_impressions`.

    Raises:
        RequestError: too few, or as `make_impressions`.
    """
    held_out = round(HELD_OUT * count)
    if held_out < 1:
        raise RequestError(
            f"impressions is {count}: give enough to set {HELD_OUT:.0%} aside, such as {Synthesis.count}"
        )
    how = Synthesis(count=count, batch_size=min(count, Synthesis.batch_size))
    inputs = make_impressions(model, example_inputs, how, run=run, mixed_precision=mixed_precision).inputs
    kept, held = inputs[:-held_out], inputs[-held_out:]
    shown, device = _shown(held, example_inputs, run.seed), torch.device(run.device or "cpu")
    structure = pytree.tree_structure(example_inputs)
    return Blends(kept, example_inputs, _EPOCH), _Answered(shown, structure, _answers(model, shown, structure, device))


def _shown(held: Tensor, example_inputs: Inputs, seed: int) -> Tensor:
    """Inputs to calibrate on (2 * _TIMES * N, ...), out of the impressions `held` (N, ...)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [Blends(held, example_inputs, _TIMES * len(held), most) for most in (0.0, 0.5)]
        return torch.stack([pytree.tree_leaves(part[i][0])[0] for part in parts for i in range(len(part))])


class _Answered(Dataset[tuple[Any, int]]):
    """Inputs (N, ...) in a structure, each with its label."""

    def __init__(self, inputs: Tensor, structure: pytree.TreeSpec, labels: Tensor) -> None:
        self.inputs, self.structure, self.labels = inputs, structure, labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return pytree.tree_unflatten([self.inputs[index]], self.structure), int(self.labels[index])


@torch.no_grad()
def _answers(model: fx.GraphModule, inputs: Tensor, structure: pytree.TreeSpec, device: torch.device) -> Tensor:
    """The class, (N,), that the model in evaluation mode answers to each input."""
    with placed(model, device):
        model.eval()
        rows = [
            logits_of(call(model, pytree.tree_unflatten([x.to(device)], structure))).argmax(-1)
            for x in inputs.split(Synthesis.batch_size)
        ]
    return torch.cat([row.cpu() for row in rows])
