"""What each step of a recipe does to a model."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ...errors import RequestError
from ...passes.rewrites import low_rank
from ...runtime.predict.dynamic import DynamicModel, graph_of
from ..exits.convert import convert
from ..gates.gate import gate
from ..importance.scores import NEED_DATA
from ..options.steps import Convert, Export, Gate, LowRank, Making, Prune, Retrain, Sparsify, Step, Unstructured
from ..pruning.prune import RECALIBRATION_BATCHES, prune
from ..pruning.unstructured import HoldZeros, prune_weights
from ..sparsity.retrain import retrain
from ..sparsity.sparsify import sparsify
from ..synthesis.data_free import check_without_data
from ..training.batches import HasSplits
from ..training.losses import cross_entropy
from ..training.recalibrate import recalibrate_batchnorm
from ..training.trainer import fit


def check_request(steps: Sequence[Step], data: str | None) -> None:
    """Raises RequestError for what can be seen before anything is loaded: missing data, files outside the folder."""
    for step in steps:
        if isinstance(step, Export):
            if Path(step.onnx).name != step.onnx:
                raise RequestError(f"export: onnx: {step.onnx!r} is not the plain name of a file in the run folder")
        elif data is None:
            _check_needs_no_data(step)


def _check_needs_no_data(step: Making) -> None:
    if isinstance(step, Convert):
        check_without_data(step.recipe, step.freeze_trunk, step.risk, step.shots)
        return
    if isinstance(step, Sparsify | Retrain | Gate):
        raise RequestError(f"{step.name} learns from data: give labelled data, such as --data digits")
    option = "finetune" if step.finetune else None
    if option is None and isinstance(step, Prune) and step.importance in NEED_DATA:
        option = f"importance {step.importance}"
    if option is not None:
        raise RequestError(f"{step.name} with {option} needs labelled data: give --data, such as --data digits")


def check_order(steps: Sequence[Step], model: nn.Module) -> None:
    """Raises RequestError when a step would get a model that is dynamic already; one with gates may get exits."""
    exits = isinstance(model, DynamicModel) and bool(model.exits)
    gates = isinstance(model, DynamicModel) and bool(model.gates)
    for step in steps:
        if exits and isinstance(step, Gate):
            raise RequestError("gate takes a model without exits: gate the static model, then add the exits by convert")
        if (exits and not isinstance(step, Export)) or (gates and not isinstance(step, Convert | Export)):
            raise RequestError(f"{step.name} takes a static model, but gets one that is dynamic already: leave it out")
        exits, gates = exits or isinstance(step, Convert), gates or isinstance(step, Gate)


def result_name(step: Step) -> str:
    """What the report calls the model that a step made."""
    names = {"prune": "pruned", "sparsify": "sparsified", "retrain": "retrained", "gate": "gated", "convert": "dynamic"}
    return names.get(step.name, step.name)


def take(
    step: Making,
    model: fx.GraphModule | DynamicModel,
    data: HasSplits | None,
    *,
    example_inputs: Any,
    load: Callable[[str], fx.GraphModule],
    seed: int,
    device: torch.device,
    work: Path,
    progress: bool,
) -> fx.GraphModule | DynamicModel:
    """The model that a step makes of `model`, on the same device.

    load: captures a MODEL that an option names, on that device. work: keeps what the training of a step resumes from.
    """
    graph = graph_of(model)
    common: dict[str, Any] = {"seed": seed, "device": device, "run_dir": work, "resume": True, "progress": progress}
    if isinstance(step, Prune):
        return _prune(step, graph, data, **common)
    if isinstance(step, LowRank | Unstructured):
        return _baseline(step, graph, data, **common)
    if isinstance(step, Sparsify):
        assert data is not None
        return sparsify(graph, data.train, **_options(step), **common)
    if isinstance(step, Retrain):
        assert data is not None
        early = None if step.early is None else load(step.early)
        return retrain(graph, data.train, **{**_options(step), "early": early}, **common)
    if isinstance(step, Gate):
        assert data is not None
        return gate(graph, example_inputs, data=data, **asdict(step), **common)
    return convert(graph, example_inputs, data=data, **asdict(step), **common)


_OPTIMIZERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": partial(torch.optim.SGD, momentum=0.9)}


def _options(step: Sparsify | Retrain) -> dict[str, Any]:
    """The fields of a step as its function takes them."""
    return {**asdict(step), "optimizer": _OPTIMIZERS[step.optimizer]}


def _prune(step: Prune, model: fx.GraphModule, data: HasSplits | None, *, seed: int, **run: Any) -> fx.GraphModule:
    if data is None:
        return prune(model, seed=seed, **asdict(step), **run)
    small = prune(model, data=data.train, seed=seed, **asdict(step), **run)
    if not step.finetune and step.steps == 1:  # else it was done before the training
        recalibrate_batchnorm(small, data.train, batches=RECALIBRATION_BATCHES, seed=seed)
    return small


def _baseline(
    step: LowRank | Unstructured, model: fx.GraphModule, data: HasSplits | None, *, seed: int, **run: Any
) -> fx.GraphModule:
    if isinstance(step, LowRank):
        small = low_rank.LowRank(step.energy, step.rank, step.macs, step.params)(model).gm
    else:
        small = prune_weights(model, step.sparsity, scope=step.scope)
    if data is not None:
        recalibrate_batchnorm(small, data.train, batches=RECALIBRATION_BATCHES, seed=seed)
    if step.finetune:
        assert data is not None
        hooks = [HoldZeros(small)] if isinstance(step, Unstructured) else []
        training: dict[str, Any] = {"epochs": step.finetune, "lr": step.lr, "batch_size": step.batch_size, "seed": seed}
        fit(small, cross_entropy, data.train, hooks=hooks, **training, **run)
    return small
