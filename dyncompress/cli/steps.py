"""What each step of a recipe does to a model."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..compress.convert import convert
from ..compress.evaluate import logits_of
from ..compress.prune import prune
from ..compress.recalibrate import recalibrate_batchnorm
from ..compress.trainer import fit
from ..errors import RequestError
from ..model_zoo.data import Splits
from ..runtime.dynamic import DynamicModel
from ..runtime.recipe import Convert, Export, Prune, Step

_RECALIBRATION_BATCHES = 32


def check_data(steps: Sequence[Step], data: str | None) -> None:
    """Raises RequestError when a step needs data and there is none."""
    for step in steps:
        if data is not None or isinstance(step, Export):
            continue
        if isinstance(step, Convert):
            raise RequestError("convert without data is not available yet: give labelled data, such as --data digits")
        if step.finetune or step.importance == "taylor":
            option = "finetune" if step.finetune else "importance taylor"
            raise RequestError(f"{step.name} with {option} needs labelled data: give --data, such as --data digits")


def check_order(steps: Sequence[Step], model: nn.Module) -> None:
    """Raises RequestError when a step would get a model that is dynamic already."""
    dynamic = isinstance(model, DynamicModel)
    for step in steps:
        if dynamic and not isinstance(step, Export):
            raise RequestError(f"{step.name} takes a static model, but gets one that is dynamic already: leave it out")
        dynamic = dynamic or isinstance(step, Convert)


def result_name(step: Step) -> str:
    """What the report calls the model that a step made."""
    return "dynamic" if isinstance(step, Convert) else "pruned"


def take(
    step: Prune | Convert,
    model: nn.Module,
    example_inputs: Any,
    data: Splits | None,
    *,
    seed: int,
    work: Path,
    progress: bool,
) -> nn.Module:
    """The model that a step makes of `model`, on its device. `work` keeps what an interrupted training resumes from."""
    common: dict[str, Any] = {"seed": seed, "run_dir": work, "resume": True, "progress": progress}
    if isinstance(step, Prune):
        return _prune(step, model, example_inputs, data, **common)
    assert data is not None
    return convert(model, example_inputs, data=data, **asdict(step), **common)


def _prune(
    step: Prune, model: nn.Module, example_inputs: Any, data: Splits | None, *, seed: int, **training: Any
) -> nn.Module:
    options = {k: v for k, v in asdict(step).items() if k not in ("finetune", "lr", "batch_size")}
    if data is None:
        return prune(model, example_inputs, **options)
    small = prune(model, example_inputs, data=data.train, **options)
    recalibrate_batchnorm(small, data.train, batches=_RECALIBRATION_BATCHES, seed=seed)
    if step.finetune:
        training |= {"epochs": step.finetune, "lr": step.lr, "batch_size": step.batch_size}
        fit(small, _cross_entropy, data.train, seed=seed, **training)
    return small


def _cross_entropy(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(output), labels)
