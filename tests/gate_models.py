"""Gated models whose gates really differ from sample to sample, shared by the tests of skip gates."""

import torch
from exit_models import graph
from torch import fx

from dyncompress.passes.gates.insert_gates import InsertGates
from dyncompress.runtime.predict.dynamic import DynamicModel


def gated_graph(name: str, gate: str = "pooled") -> fx.GraphModule:
    """A captured model of `exit_models` with gates, about half of them open, and not the same ones for every sample."""
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


def gated(name: str, gate: str = "pooled") -> DynamicModel:
    return DynamicModel(gated_graph(name, gate)).eval()
