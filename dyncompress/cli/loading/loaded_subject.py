"""What a command works on: a model and data, loaded, checked against each other and put on a device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.data import default_collate

from ...compress.recipes.recipe import Recipe
from ...compress.training.batches import call, to_device
from ...compress.training.losses import logits_of
from ...errors import RequestError
from ...model_zoo.load_data import Splits, load_data
from ...passes.capture.capture import capture
from ...passes.graph.inputs import Inputs
from ...runtime.predict.dynamic import DynamicModel
from .models import load_model

_EXAMPLES = 2


@dataclass(frozen=True)
class Subject:
    """A model in eval mode, one call's inputs and the data, on `device`.

    graph: the captured model, or the trunk of a dynamic one. trained: False where the weights are random.
    """

    module: nn.Module
    graph: fx.GraphModule
    example_inputs: Inputs
    data: Splits | None
    device: torch.device
    trained: bool

    @property
    def captured(self) -> fx.GraphModule | DynamicModel:
        """What steps and exports work on."""
        return self.module if isinstance(self.module, DynamicModel) else self.graph


def load_splits(recipe: Recipe) -> Splits | None:
    """The data of a recipe, if it names any. Raises RequestError for every mistake in it."""
    return load_data(recipe.data, recipe.seed) if recipe.data is not None else None


def prepare(recipe: Recipe, data: Splits | None, *, allow_pickle: bool = False, one_of_many: bool = False) -> Subject:
    """Loads the model of a recipe, checks that it fits the data, and captures it.

    one_of_many: the architecture may be meant for another model than this one.

    Raises RequestError for every mistake in the request.
    """
    device = pick_device(recipe.device)
    torch.manual_seed(recipe.seed)
    samples = first_samples(data) if data is not None else None
    loaded = load_model(
        recipe.model,
        arch=recipe.arch,
        allow_pickle=allow_pickle,
        input_shape=recipe.input_shape,
        samples=samples,
        one_of_many=one_of_many,
    )
    if data is not None:
        _check_fit(recipe.model, loaded.module, data, samples)
    module, inputs = loaded.module.to(device), to_device(loaded.example_inputs, device)
    graph = module.trunk if isinstance(module, DynamicModel) else capture(module, inputs)
    return Subject(module, graph, inputs, data, device, loaded.trained)


def capture_named(subject: Subject, spec: str) -> fx.GraphModule:
    """Another MODEL, which takes the same inputs, captured on the same device."""
    loaded = load_model(spec, samples=subject.example_inputs)
    return capture(loaded.module, loaded.example_inputs).to(subject.device)


def pick_device(name: str | None) -> torch.device:
    """The device of this name; without one, a GPU where there is one. Raises RequestError when it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RequestError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def first_samples(data: Splits) -> Any:
    """The inputs of the first training samples, as one batch."""
    return default_collate([data.train[index][0] for index in range(_EXAMPLES)])


def _check_fit(spec: str, module: nn.Module, data: Splits, samples: Any) -> None:
    shape = "x".join(map(str, samples.shape[1:])) if isinstance(samples, Tensor) else "several inputs"
    try:
        with torch.no_grad():
            output = call(module, samples)
    except Exception as error:  # a model may fail in any way on inputs it was not made for
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(f"{spec} does not take the samples of {data.name} ({shape}): {reason}") from error
    logits = logits_of(output)
    if logits.shape[-1] < data.classes:
        raise RequestError(
            f"{spec} puts out {'x'.join(map(str, logits.shape[1:]))} numbers per sample, but {data.name} has "
            f"{data.classes} classes"
        )
