"""What each step of a recipe does to a model."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import fx, nn

from ...errors import RequestError
from ...passes.graph.inputs import Inputs
from ...runtime.predict.dynamic import DynamicModel, graph_of
from ..exits.convert import convert
from ..gates.gate import gate
from ..importance.scores import NEED_DATA
from ..options.steps import Convert, Export, Gate, LowRank, Making, Prune, Retrain, Sparsify, Step, Unstructured
from ..options.training_options import Run
from ..pruning.baselines import low_rank, prune_weights
from ..pruning.prune import prune
from ..sparsity.retrain import retrain
from ..sparsity.sparsify import sparsify
from ..synthesis.data_free import check_without_data
from ..training.batches import HasSplits


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
        check_without_data(step)
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
    example_inputs: Inputs,
    load: Callable[[str], fx.GraphModule],
    run: Run,
) -> fx.GraphModule | DynamicModel:
    """The model that a step makes of `model`, on the same device: one call of the verb that the step is named after.

    load: captures a MODEL that an option names, on that device.
    """
    graph = graph_of(model)
    if isinstance(step, Prune):
        return prune(graph, data=data, run=run, **vars(step))
    if isinstance(step, LowRank):
        return low_rank(graph, data=data, run=run, **vars(step))
    if isinstance(step, Unstructured):
        return prune_weights(graph, data=data, run=run, **vars(step))
    if isinstance(step, Convert):
        return convert(graph, example_inputs, data=data, run=run, **vars(step))
    assert data is not None  # `check_request`
    if isinstance(step, Gate):
        return gate(graph, example_inputs, data=data, run=run, **vars(step))
    if isinstance(step, Sparsify):
        return sparsify(graph, data, run=run, **vars(step))
    early = None if step.early is None else load(step.early)
    return retrain(graph, data, early=early, training=step.training, run=run)
