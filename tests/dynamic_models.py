"""Dynamic models whose samples really differ in where they leave and what they skip, and how to watch them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from cases import CASES, call, gated_graph, graph_with_exits
from scipy.special import softmax
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dyncompress.passes.graph.copying import deep_copy
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import ExitPolicy


def spread(name: str) -> DynamicModel:
    """A dynamic model of its own, in evaluation mode, its heads' answers spread out."""
    made = DynamicModel(deep_copy(graph_with_exits(name))).eval()
    for head in made.trunk.exits.children():
        head.linear.weight.data *= 4
    return made


def leaning(name: str, policy: ExitPolicy) -> DynamicModel:
    """In evaluation mode; the logits of every exit have mean 0 and deviation 1 per class, and lean to the last one."""
    made = DynamicModel(deep_copy(graph_with_exits(name)), policy).eval()
    for head, z in zip(made.trunk.exits.children(), call(made.all_logits, CASES[name].batch(100)), strict=False):
        head.linear.weight.data /= z.std(0)[:, None]
        head.linear.bias.data = (head.linear.bias - z.mean(0)) / z.std(0) + torch.linspace(0, 2, z.shape[1])
    return made


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """Least squares with a penalty: channels that never fire leave it one answer, whatever the rounding."""
    x, y = x.double(), y.double()
    return torch.linalg.solve(x.T @ x + 1e-3 * torch.eye(x.shape[1]), x.T @ y).float()


def easy() -> tuple[DynamicModel, TensorDataset]:
    """An untrained model of its own and labels that its end mostly gives, its exits less often."""
    torch.manual_seed(0)
    with torch.random.fork_rng():  # the same numbers follow, whether or not the model was there already
        made, data = _easy()
    return deep_copy(made), data


@cache
def _easy() -> tuple[DynamicModel, TensorDataset]:
    made = DynamicModel(deep_copy(graph_with_exits("resnet"))).eval()
    x = CASES["resnet"].batch(600)
    final = made.all_logits(x)[-1]
    for k, head in enumerate(made.trunk.exits.children()):
        features: list[Tensor] = []
        hook = head.linear.register_forward_pre_hook(lambda _, inputs, kept=features: kept.append(inputs[0]))
        made.all_logits(x)
        hook.remove()
        fitted = ridge(torch.cat([features[0], torch.ones(600, 1)], 1), final - final.mean(0))
        head.linear.weight.data, head.linear.bias.data = (4 + k) * fitted[:-1].T, (4 + k) * fitted[-1]
    labels = (final - final.mean(0)).argmax(-1)
    made.trunk.fc.bias.data -= final.mean(0)
    return made, TensorDataset(x, torch.where(torch.rand(600) < 0.05, (labels + 1) % 10, labels))


def gated(name: str, gate: str = "pooled") -> DynamicModel:
    return DynamicModel(gated_graph(name, gate)).eval()


class Forced(nn.Module):
    """The gates' own decisions, but for those that are made by hand."""

    def __init__(self, by_hand: dict[int, float]) -> None:
        super().__init__()
        self.by_hand = by_hand

    def forward(self, logit: Tensor, k: int) -> Tensor:
        own = (logit > 0).to(logit.dtype)
        return torch.full_like(own, self.by_hand[k]) if k in self.by_hand else own


def policy_for(made: DynamicModel, batch: Any, rule: str, exits: int) -> ExitPolicy:
    """Thresholds, each well between two samples' scores, that let half of those still there leave at each exit; the
    last one stays."""
    temperatures = tuple(1.0 + 0.5 * k for k in range(exits))
    thresholds = []
    logits = [z.double().numpy() for z in call(made.all_logits, batch)]
    there = np.ones(len(logits[0]), dtype=bool)
    for z, t in zip(logits, temperatures, strict=False):
        p = softmax(z / t, axis=1)
        sure = p.max(1) if rule == "max-softmax" else -(p * np.log(p)).sum(1) / math.log(p.shape[1])
        scores = np.sort(sure[there])
        if len(scores) == 1:
            scores = np.array([scores[0], 1.0] if rule == "max-softmax" else [0.0, scores[0]])
        middle = len(scores) // 2
        thresholds.append(float((scores[middle - 1] + scores[middle]) / 2))
        there &= ~(sure >= thresholds[-1] if rule == "max-softmax" else sure <= thresholds[-1])
    return ExitPolicy(rule, tuple(thresholds), temperatures)


@contextmanager
def rows_seen(made: DynamicModel, paths: list[str]) -> Iterator[dict[str, list[int]]]:
    """Notes with how many samples each of these modules of the trunk is called."""
    seen: dict[str, list[int]] = {path: [] for path in paths}
    hooks = [
        made.trunk.get_submodule(path).register_forward_pre_hook(
            lambda _, inputs, path=path: seen[path].append(len(inputs[0]))
        )
        for path in paths
    ]
    yield seen
    for hook in hooks:
        hook.remove()
