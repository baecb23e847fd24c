"""What every verb says of a request before it works: dynamic models, numbers that cannot be, names written plainly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import graph
from data import make_stripes
from torch import nn

import dyncompress as dc

VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "prune": lambda model: dc.prune(model, torch.randn(2, 1, 8, 8), macs=0.5),
    "sparsify": lambda model: dc.sparsify(model, make_stripes(), macs=0.5),
    "low_rank": lambda model: dc.low_rank(model, torch.randn(2, 1, 8, 8), energy=0.9),
    "prune_weights": lambda model: dc.prune_weights(model, torch.randn(2, 1, 8, 8), sparsity=0.5),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_dynamic_model_is_refused(verb: str) -> None:
    dynamic = dc.DynamicModel(dc.InsertExits(exits=1)(graph("resnet")).gm)
    with pytest.raises(dc.RequestError, match="dynamic already"):
        VERBS[verb](dynamic)


@pytest.mark.parametrize("made", [dc.FoldBatchNorm(), dc.LowRank(energy=0.9), dc.KeepExits((0,)), dc.InsertExits()])
def test_a_pass_wants_a_captured_graph(made: dc.GraphPass[Any]) -> None:
    with pytest.raises(dc.RequestError, match=r"use capture\(\)"):
        made(nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"lr": -1.0}, {"batch_size": 0}])
def test_a_training_that_cannot_be_is_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(dc.RequestError, match="give a positive number"):
        dc.Training(**wrong)


@pytest.mark.parametrize("wrong", [{"limits": dc.Cuts()}, {"training": {"epochs": 2}}, {"cuts": None}])
def test_another_group_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(dc.RequestError, match=r"prune: \w+ is a dc\.\w+, not "):
        dc.prune(graph("resnet"), macs=0.5, **wrong)


def test_a_pipeline_is_read_from_text() -> None:
    with pytest.raises(dc.RequestError, match="expected the text of a pipeline, got 5"):
        dc.Pipeline.parse(5)  # type: ignore[arg-type]


def test_one_name_to_ignore_is_one_name() -> None:
    assert dc.Limits(ignore="fc").ignore == ("fc",)  # type: ignore[arg-type]
