"""What skip gates do on data: which branches run, for which classes, for easy and hard samples; and their budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.utils.data import Subset

from ...errors import RequestError
from ...passes.gates.insert_gates import GATES_PATH
from ...passes.gates.settle_gates import SettledGates
from ...passes.graph.cost import count_macs
from ...runtime.predict.dynamic import DynamicModel
from ..evaluation.evaluate import collect_logits, evaluate, ready
from ..evaluation.reports import Report
from ..training.batches import LabelledData, call, in_order, size_of
from ..training.trainer import Epoch

_BATCH = 256
_AT_ONCE = 2048  # samples, more than enough for a mean cost to a percent
_NEAR = 0.005  # of the budget
_FARTHEST, _HALVINGS = 16.0, 18
_MOST_CLASSES = 100
_HARDNESS = 4


@dataclass(frozen=True, kw_only=True)
class GateUse:
    """What gates do on a data set, by branch in graph order.

    static_accuracy, accuracy: 0..1. macs: the share of the static model's MACs that the mean sample costs. open: how
    often each branch runs; by_class: (classes, branches), None where there are more than 100 classes; by_hardness: (4,
    branches), from the quarter of samples of which the static model is surest to that of which it is least sure.
    """

    branches: tuple[str, ...]
    static_accuracy: float
    accuracy: float
    macs: float
    open: tuple[float, ...]
    by_class: tuple[tuple[float, ...], ...] | None
    by_hardness: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class GateReport(GateUse, Report):
    """What `gate` did, and what its gates do on the calibration set.

    moved: how far the gates' logits were moved to meet the budget. settled: the branches that lost their gates. kind,
    phases, history: of the training.
    """

    verb: ClassVar[str] = "gate"
    moved: float
    settled: SettledGates
    kind: str
    phases: tuple[str, ...]
    history: tuple[Epoch, ...] = ()


def meet_budget(dynamic: DynamicModel, data: LabelledData, macs: float, device: torch.device) -> float:
    """Moves the logits of all gates, in place, by one number, so that the mean sample costs `macs`; returns it.

    It is found by bisection on up to 2048 samples. A mean within half a percent of `macs` stays as it is.

    Raises:
        RequestError: with every gate closed the mean sample costs more.
    """
    named = dynamic.trunk.named_parameters()
    biases = [p for name, p in named if name.startswith(GATES_PATH) and name.endswith("out.bias")]
    before = [bias.detach().clone() for bias in biases]
    some = Subset(data, range(min(_AT_ONCE, size_of(data, "calibration"))))

    def cost(moved: float) -> float:
        with torch.no_grad():
            for bias, old in zip(biases, before, strict=True):
                bias.copy_(old + moved)
        found = evaluate(dynamic, some, _BATCH, device).mean_macs
        assert found is not None
        return found

    if abs(cost(0.0) - macs) <= _NEAR * macs:
        return 0.0
    low, high = -_FARTHEST, _FARTHEST
    if cost(low) > macs:
        raise RequestError(
            f"with every gate closed a sample costs {cost(low):.0f} MACs, more than {macs:.0f}: give more"
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = cost(middle)
        if (1 - _NEAR) * macs <= found <= macs:
            return middle
        low, high = (low, middle) if found > macs else (middle, high)
    cost(low)
    return low


def open_rates(dynamic: DynamicModel, data: LabelledData, device: torch.device) -> list[float]:
    """How often each branch runs on a data set."""
    opened = _run(dynamic, data, device)[0]
    return list(_rates(opened, [torch.arange(len(opened))])[0])


def measure_gates(dynamic: DynamicModel, static: fx.GraphModule, data: LabelledData, device: torch.device) -> GateUse:
    """What the gates of a model do on a data set; `static` is the model without them."""
    opened, right, spent, labels = _run(dynamic, data, device)
    (static_logits,), _ = collect_logits(static, data, _BATCH, device)
    sureness = static_logits.softmax(-1).amax(-1)
    quarters = torch.argsort(sureness, descending=True).chunk(_HARDNESS)
    classes = [labels == c for c in range(dynamic.num_classes)] if dynamic.num_classes <= _MOST_CLASSES else None
    return GateUse(
        branches=tuple(dynamic.gates),
        static_accuracy=float((static_logits.argmax(-1) == labels).double().mean()),
        accuracy=float(right.double().mean()),
        macs=float(spent.double().mean()) / count_macs(static),
        open=_rates(opened, [torch.arange(len(labels))])[0],
        by_class=_rates(opened, classes) if classes is not None else None,
        by_hardness=_rates(opened, quarters),
    )


def _run(dynamic: DynamicModel, data: LabelledData, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per sample: which branches ran, whether the answer is right, the MACs and the label."""
    columns: list[tuple[Tensor, ...]] = []
    with ready(dynamic, device) as where:
        for inputs, labels in in_order(data, _BATCH, where):
            answer = call(dynamic.predict, inputs)
            columns.append(
                (answer.gates.cpu(), (answer.logits.argmax(-1) == labels).cpu(), answer.macs.cpu(), labels.cpu())
            )
    opened, right, spent, labels = (torch.cat(column) for column in zip(*columns, strict=True))
    return opened, right, spent, labels


def _rates(opened: Tensor, groups: Sequence[Tensor]) -> tuple[tuple[float, ...], ...]:
    """How often each branch ran in each group of samples; 0 in an empty one."""
    return tuple(tuple(opened[group].double().mean(0).nan_to_num().tolist()) for group in groups)
