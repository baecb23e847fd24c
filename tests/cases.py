"""Graphs that tests share: of every kind that exits and gates go into, with exits, with gates; any graph halved."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from data import text_batch
from nets import ChannelsLast, Lstm, ResNet, Text, TwoInputs, Vgg, Vit
from torch import Tensor, fx, nn

import dyncompress as dc
from dyncompress.passes.capture.capture import capture
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.passes.gates.insert_gates import GATES, InsertGates


@dataclass(frozen=True)
class Case:
    """A model, how to make a batch of n samples for it, and how many exits the tests put in."""

    kind: type[nn.Module]
    batch: Callable[[int], Any]
    exits: int


CASES = {
    "resnet": Case(ResNet, lambda n: torch.randn(n, 3, 16, 16), 3),
    "vgg": Case(Vgg, lambda n: torch.randn(n, 3, 16, 16), 2),
    "channels-last": Case(ChannelsLast, lambda n: torch.randn(n, 3, 16, 16), 2),
    "vit": Case(Vit, lambda n: torch.randn(n, 3, 16, 16), 3),
    "text": Case(Text, text_batch, 2),
    "lstm": Case(Lstm, lambda n: torch.randint(0, 100, (n, 7)), 2),
    "two-inputs": Case(TwoInputs, lambda n: (torch.randn(n, 12), torch.randn(n)), 2),
}


@cache
def model(name: str) -> nn.Module:
    """The model of a case, in evaluation mode, its batch norms with statistics of their own; not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = CASES[name].kind()
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return made.eval()


@cache
def graph(name: str) -> fx.GraphModule:
    """The captured model; not to be changed."""
    with torch.random.fork_rng():  # the same numbers follow, whether or not the graph was there already
        return capture(model(name), CASES[name].batch(2))


@cache
def graph_with_exits(name: str) -> fx.GraphModule:
    """The captured model with its exits; not to be changed."""
    captured = graph(name)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return InsertExits(CASES[name].exits)(captured).gm


WITH_BRANCHES = {"resnet": 4, "channels-last": 3, "vit": 8, "text": 6}
GATED = [(n, g) for n in WITH_BRANCHES for g in GATES if g not in ("ff1", "ff2") or n in ("resnet", "channels-last")]


def gated_graph(name: str, gate: str = "pooled") -> fx.GraphModule:
    """A captured model with gates, about half of them open, and not the same ones for every sample."""
    captured = graph(name)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        gm = InsertGates(gate)(captured).gm.eval()
        with torch.no_grad():
            for path, parameter in gm.named_parameters():
                if path.startswith("gates") and ".out." in path:
                    parameter.mul_(40) if path.endswith("weight") else parameter.zero_()
                if path.startswith("gates") and path.endswith(".linear.weight"):  # what a recurrent gate reads
                    parameter.mul_(20)
    return gm


def call(function: Callable[..., Any], batch: Any) -> Any:
    """Calls like the user does: a dict by name, a tuple by position."""
    if isinstance(batch, dict):
        return function(**batch)
    return function(*batch) if isinstance(batch, tuple) else function(batch)


def rows(batch: Any, index: Any) -> Any:
    """Some samples of a batch."""
    if isinstance(batch, dict):
        return {k: v[index] for k, v in batch.items()}
    return tuple(t[index] for t in batch) if isinstance(batch, tuple) else batch[index]


def logits_of(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output


def every_second(gm: fx.GraphModule, first: int = 0) -> dict[str, list[int]]:
    """The indices to keep, by axis; branches stay."""
    return {a.name: list(range(first, a.size, 2)) for a in dc.infer_axes(gm).prunable if a.kind != "branch"}


def halved(gm: fx.GraphModule, kinds: Mapping[str, int]) -> fx.GraphModule:
    """The smaller graph, held to answer as the masked one does; its axes are of these kinds."""
    axes = dc.infer_axes(gm)
    assert axes.untyped == {}
    assert Counter(axis.kind for axis in axes.prunable) == kinds
    keep = every_second(gm, first=1)
    small = dc.shrink(gm, keep, exact=True)
    found = dc.verify(gm, small, keep)
    assert found.ok, str(found)
    return small
