"""Learned structure of residual networks, beside Torch-Pruning's group-norm pruner: same network, MACs and epochs.

    pip install --no-deps torch-pruning==1.6.1
    python benchmarks/resnet_sparsity.py [--data fashion_mnist] [--depth 20] [--seeds 3]
                                         [--quick]                     writes benchmarks/resnet_sparsity.json

A network is trained, and then, for as many epochs each, with the same batches, optimiser and schedule:

    dense       trained on
    channels    sparsified to half its multiply-adds by group lasso over all axes
    layers      sparsified to four fifths by group lasso over residual branches
    group norm  Torch-Pruning's GroupNormPruner, with the settings of its own benchmark (reg 5e-4, global, normaliser
                "max") while the others sparsify, then pruned to the MACs of "channels", then trained on

and "channels" and "group norm" once more, half of whose loss compares with the network given ("distilled").
Accuracy on the test images in float32; training is in bfloat16 where the processor has it. What is measured is not
measured again.
"""

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import AMP, QUICK, RESIDUAL, SGD, Benchmark, complete, largest_within, macs_of, means, residual, run_in
from data import splits
from torch import fx, nn

import dyncompress as dc
from dyncompress.compress.sparsity.sparsify_report import SparsifyReport
from dyncompress.compress.training.losses import Distilled, cross_entropy
from dyncompress.compress.training.trainer import Optimizer, fit
from dyncompress.passes.axes.axis_kinds import BRANCH
from dyncompress.passes.graph.cost import count_parameters

BENCHMARK = Benchmark(
    __file__, __doc__, data=True, needs=("torch_pruning",), within="networks/fashion_mnist resnet20/summary",
    published="CIFAR-10 ResNet-20 with two layers fewer 91.25 -> 92.60 % (SSL, Wen et al., NeurIPS 2016)",
    ours="Fashion-MNIST ResNet-20: {dense/accuracy:.1%} dense; {channels/accuracy:.1%} with {channels/macs:.2f} of the "
    "MACs in channels, Torch-Pruning {group norm/accuracy:.1%}; {layers/accuracy:.1%} with {layers/macs:.2f} in layers",
)  # fmt: skip
SPARSE, FINE, MORE_LR = 1 if QUICK else 3, 1 if QUICK else 2, 0.05
CHANNELS, LAYERS, REG, DISTILL = 0.5, 0.8, 5e-4, 0.5


def more(epochs: int, optimizer: Optimizer = SGD) -> dc.Training:
    """What follows the first training."""
    return replace(RESIDUAL, epochs=epochs, lr=MORE_LR, optimizer=optimizer)


class Networks:
    """One seed's networks: each is trained once, and taken from its folder later."""

    def __init__(self, asked: argparse.Namespace, seed: int) -> None:
        self.folder = BENCHMARK.runs / f"{asked.data}-{asked.depth}-{seed}"
        self.data, self.depth, self.seed = splits(asked.data), asked.depth, seed
        self.example = self.data.train[0][0][None]

    def train(self, model: nn.Module, name: str, training: dc.Training, distill: float = 0.0) -> nn.Module:
        """`model`, trained."""
        loss, teacher = (Distilled(cross_entropy, distill), self.first()) if distill else (cross_entropy, None)
        fit(model, loss, self.data.train, training, run_in(self.folder / name, self.seed), teacher=teacher)
        return model.eval()

    def first(self) -> nn.Module:
        return self.train(residual(self.depth, self.data, self.seed), "first", RESIDUAL)

    def dense(self) -> nn.Module:
        return self.train(self.first(), "dense", more(SPARSE + FINE))

    def channels(self, distill: float = 0.0) -> nn.Module:
        return self.learned("channels", CHANNELS, "axes", distill)

    def layers(self) -> nn.Module:
        return self.learned("layers", LAYERS, "layers")

    def learned(self, name: str, macs: float, kind: str, distill: float = 0.0) -> fx.GraphModule:
        run = run_in(self.folder / f"{name}{'-distilled' if distill else ''}", self.seed)
        return dc.sparsify(
            self.first(), self.data.train, macs=macs, kinds=(kind,), finetune=FINE, distill=distill,
            lasso=dc.Lasso(shrink_every=1), training=more(SPARSE), run=run,
        )  # fmt: skip

    def group_norm(self, macs: int, distill: float = 0.0) -> nn.Module:
        """Torch-Pruning's: its gradient of the group norms is added before every step of the optimiser."""
        import torch_pruning as tp

        model = self.first()

        def pruner(net: nn.Module, ratio: float) -> Any:
            scores = tp.importance.GroupMagnitudeImportance(p=2, normalizer="max")
            return tp.pruner.GroupNormPruner(
                net, self.example, importance=scores, reg=REG, global_pruning=True, pruning_ratio=ratio,
                ignored_layers=[net.get_submodule("classifier")],
            )  # fmt: skip

        sparse = pruner(model, 0.5)
        sparse.update_regularizer()

        def regularised(parameters: Any, lr: float) -> torch.optim.Optimizer:
            optimizer = SGD(parameters, lr=lr)
            optimizer.register_step_pre_hook(lambda *_: sparse.regularize(model))
            return optimizer

        end = "-distilled" if distill else ""
        self.train(model, f"group-norm-sparse{end}", more(SPARSE, regularised), distill)

        def pruned(ratio: float) -> nn.Module:
            small = copy.deepcopy(model)
            pruner(small, ratio).step()
            return small

        small = largest_within(macs, self.example, pruned)
        return self.train(small, f"group-norm{end}", more(FINE), distill)


def measure(nets: Networks, rows: dict[str, Any], save: Callable[[], None]) -> None:
    """What the rows of this seed lack."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "first": nets.first,
        "dense": nets.dense,
        "channels": nets.channels,
        "group norm": lambda: nets.group_norm(round(rows["channels"]["macs"] * whole)),
        "layers": nets.layers,
        "channels, distilled": lambda: nets.channels(DISTILL),
        "group norm, distilled": lambda: nets.group_norm(round(rows["channels, distilled"]["macs"] * whole), DISTILL),
    }
    whole = 0 if rows.keys() >= makers.keys() else macs_of(nets.first(), nets.example)
    complete(rows, {name: partial(row, nets, make, whole) for name, make in makers.items()}, save)


def row(nets: Networks, make: Callable[[], nn.Module], whole: int) -> dict[str, Any]:
    """One network's figures; whole: MACs of the dense one."""
    begin = time.process_time()
    model = make()
    found = {
        "accuracy": round(dc.evaluate(model, nets.data.test, batch_size=250).accuracy, 4),
        "macs": round(macs_of(model, nets.example) / whole, 4),
        "parameters": count_parameters(model),
        "cpu_s": round(time.process_time() - begin),
    }
    if isinstance(model, fx.GraphModule):
        report = SparsifyReport.of(model)
        removed = [axis for axis in report.kept.values() if axis.kind == BRANCH and not axis.kept]
        found |= {"learned_share": round(report.learned, 4), "branches_removed": len(removed)}
        found["largest_difference_at_surgery"] = max(step.difference for step in report.surgeries)
    return found


def summary(seeds: dict[str, Any]) -> dict[str, Any]:
    """Means over the seeds."""
    table: dict[str, Any] = {}
    for name in next(iter(seeds.values()), {}):
        rows = [rows[name] for rows in seeds.values() if name in rows]
        table[name] = {"seeds": len(rows), **means(rows, "accuracy", "macs")}
    return table


def main() -> None:
    """Measures what the results lack."""
    parser = BENCHMARK.parser()
    parser.add_argument("--data", default="fashion_mnist", choices=("fashion_mnist", "cifar10"))
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1 if QUICK else 3)
    asked = BENCHMARK.start(parser)
    warnings.filterwarnings("ignore", module="torch_pruning")
    setting = {
        "epochs": [RESIDUAL.epochs, SPARSE, FINE], "lr": [RESIDUAL.lr, MORE_LR], "batch": RESIDUAL.batch_size,
        "reg": REG, "precision": AMP,
    }  # fmt: skip
    name = f"{asked.data} resnet{asked.depth}"

    def save() -> None:
        """Only this network's part is replaced: two of them may run side by side."""
        found = {"setting": setting, "summary": summary(seeds), "seeds": seeds}
        nets = {**BENCHMARK.read().get("networks", {}), name: found}
        BENCHMARK.write({"networks": nets}, f"--data {asked.data} --depth {asked.depth}")

    before = BENCHMARK.checked(BENCHMARK.read().get("networks", {}).get(name, {}), setting)
    seeds: dict[str, Any] = before.get("seeds", {})
    for seed in range(asked.seeds):
        measure(Networks(asked, seed), seeds.setdefault(str(seed), {}), save)
    print(json.dumps(summary(seeds), indent=1))


if __name__ == "__main__":
    main()
