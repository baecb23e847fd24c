"""Much training out of few inputs: some labelled ones of every class, and blends that the model itself answers.

A blend is (1 - s) a + s b of two inputs with s uniform in 0..most (mixup, Zhang et al., ICLR 2018, on inputs alone);
images are shifted, too, what leaves on one side coming back on the other. Exits that are distilled learn from the full
model's answer to it, whatever it shows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, Subset

from ...errors import RequestError
from ...passes.edit.outputs import all_logits
from ...passes.graph.inputs import Inputs
from ...runtime.predict.dynamic import DynamicModel
from ..options.choices import WITHOUT_LABELS
from ..training.batches import LabelledData, size_of
from ..training.losses import UNLABELLED

EPOCH = 4096  # blends that are one pass of training, however few the inputs

_IMAGE_DIMS = 3  # of one sample: (channels, height, width)
_SHIFT = 0.1  # of the size, at most


class Blends(Dataset[tuple[Any, int]]):
    """`size` fresh blends of inputs (N, ...) an epoch, all unlabelled, each in the structure of `example_inputs`."""

    def __init__(self, inputs: Tensor, example_inputs: Inputs, size: int = EPOCH, most: float = 0.5) -> None:
        self.inputs, self.size, self.most = inputs, size, most
        self.structure = pytree.tree_structure(example_inputs)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Any, int]:
        other, share = int(torch.randint(len(self.inputs), ())), self.most * float(torch.rand(()))
        blend = torch.lerp(self.inputs[index % len(self.inputs)], self.inputs[other], share)
        if blend.dim() == _IMAGE_DIMS:
            blend = blend.roll([_shift(size) for size in blend.shape[1:]], (1, 2))
        return pytree.tree_unflatten([blend], self.structure), UNLABELLED


def _shift(size: int) -> int:
    most = int(_SHIFT * size)
    return int(torch.randint(-most, most + 1, ()))


def few_shot_training(data: LabelledData, shots: int, dynamic: DynamicModel, recipe: str, seed: int) -> LabelledData:
    """Blends of `shots` samples of each class the model knows, where recipe and inputs allow it; else these samples.

    Raises:
        RequestError: a model that answers at every position, or as `few_shots`.
    """
    if dynamic.per_position:
        raise RequestError(
            "shots are counted per class of samples, but the model answers at every position: leave them out"
        )
    few = few_shots(data, shots, all_logits(dynamic.trunk)[-1].meta["val"].shape[-1], seed)
    samples = [few[i][0] for i in range(len(few))]
    tensors = [leaf for sample in samples for leaf in pytree.tree_leaves(sample)]
    if recipe not in WITHOUT_LABELS or len(tensors) > len(samples) or not tensors[0].is_floating_point():
        return few
    return Blends(torch.stack(tensors), samples[0])


def few_shots(data: LabelledData, shots: int, classes: int, seed: int) -> Subset[Any]:
    """`shots` samples of each class 0..classes - 1, drawn by the seed; items of no such class are passed over.

    Raises:
        RequestError: shots below 1, or a class with fewer samples.
    """
    if shots < 1:
        raise RequestError(f"shots is {shots}: give the labelled samples to take per class, such as 5")
    left, taken = dict.fromkeys(range(classes), shots), []
    order = torch.randperm(size_of(data, "training"), generator=torch.Generator().manual_seed(seed)).tolist()
    for index in order:
        label = int(data[index][1])
        if left.get(label):
            left[label] -= 1
            taken.append(index)
        if len(taken) == shots * classes:
            return Subset(data, taken)
    label, missing = next((c, n) for c, n in left.items() if n)
    raise RequestError(
        f"the training data has {shots - missing} samples of class {label}, not {shots}: take fewer shots"
    )
