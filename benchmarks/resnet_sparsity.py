"""Learned structure of residual networks, beside Torch-Pruning's group-norm pruner: same network, MACs and epochs.

    pip install --no-deps torch-pruning==1.6.1
    python benchmarks/resnet_sparsity.py [--data fashion_mnist] [--depth 20] [--seeds 3] [--out FOLDER]
                                                                       writes benchmarks/resnet_sparsity.json

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
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import AMP, BATCH, FIRST, LR, SGD, check_setting, largest_within, macs_of, read, start, write
from data import splits
from torch import fx, nn
from vs_torch_pruning import header

import dyncompress as dc
from dyncompress.compress.training.losses import Distilled, cross_entropy
from dyncompress.compress.training.trainer import fit
from dyncompress.model_zoo import build
from dyncompress.passes.axes.axis_kinds import BRANCH

RESULTS = Path(__file__).with_suffix(".json")
SPARSE, FINE, MORE_LR = 3, 2, 0.05
CHANNELS, LAYERS, REG, DISTILL = 0.5, 0.8, 5e-4, 0.5


class Bench:
    """One seed's networks: each is trained once, and taken from its folder later."""

    def __init__(self, asked: argparse.Namespace, seed: int) -> None:
        self.folder = asked.out / f"{asked.data}-{asked.depth}-{seed}"
        self.data, self.depth, self.seed = splits(asked.data), asked.depth, seed
        self.options: dict[str, Any] = {"batch_size": BATCH, "seed": seed, "mixed_precision": AMP, "progress": True}
        self.example = self.data.train[0][0][None]

    def train(
        self, model: nn.Module, name: str, epochs: int, lr: float, optimizer: Any = SGD, distill: float = 0.0
    ) -> nn.Module:
        """`model`, trained."""
        run = self.folder / name
        loss, teacher = (Distilled(cross_entropy, distill), self.first()) if distill else (cross_entropy, None)
        fit(
            model, loss, self.data.train, epochs=epochs, lr=lr, optimizer=optimizer, teacher=teacher, run_dir=run,
            resume=run.exists(), **self.options,
        )  # fmt: skip
        return model.eval()

    def first(self) -> nn.Module:
        torch.manual_seed(self.seed)
        net = build(f"resnet{self.depth}-cifar", channels=self.example.shape[1])
        return self.train(net, "first", FIRST, LR)

    def dense(self) -> nn.Module:
        return self.train(self.first(), "dense", SPARSE + FINE, MORE_LR)

    def channels(self, distill: float = 0.0) -> nn.Module:
        return self.learned("channels", CHANNELS, "axes", distill)

    def layers(self) -> nn.Module:
        return self.learned("layers", LAYERS, "layers")

    def learned(self, name: str, macs: float, kind: str, distill: float = 0.0) -> fx.GraphModule:
        run = self.folder / f"{name}{'-distilled' if distill else ''}"
        return dc.sparsify(
            self.first(), self.data.train, macs=macs, kinds=(kind,), epochs=SPARSE, finetune=FINE, shrink_every=1,
            lr=MORE_LR, optimizer=SGD, distill=distill, run_dir=run, resume=run.exists(), **self.options,
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
        self.train(model, f"group-norm-sparse{end}", SPARSE, MORE_LR, regularised, distill)

        def pruned(ratio: float) -> nn.Module:
            small = copy.deepcopy(model)
            pruner(small, ratio).step()
            return small

        small = largest_within(macs, self.example, pruned)
        return self.train(small, f"group-norm{end}", FINE, MORE_LR, distill=distill)


def measure(bench: Bench, rows: dict[str, Any], save: Callable[[], None]) -> None:
    """What the rows of this seed lack."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "first": bench.first,
        "dense": bench.dense,
        "channels": bench.channels,
        "group norm": lambda: bench.group_norm(round(rows["channels"]["macs"] * whole)),
        "layers": bench.layers,
        "channels, distilled": lambda: bench.channels(DISTILL),
        "group norm, distilled": lambda: bench.group_norm(round(rows["channels, distilled"]["macs"] * whole), DISTILL),
    }
    missing = [name for name in makers if name not in rows]
    whole = macs_of(bench.first(), bench.example) if missing else 0
    for name in missing:
        begin = time.process_time()
        model = makers[name]()
        rows[name] = {
            "accuracy": round(dc.evaluate(model, bench.data.test, batch_size=250).accuracy, 4),
            "macs": round(macs_of(model, bench.example) / whole, 4),
            "parameters": sum(p.numel() for p in model.parameters()),
            "cpu_s": round(time.process_time() - begin),
        }
        if isinstance(model, fx.GraphModule):
            report = model.meta["info"]["sparsify"]
            removed = [key for key, axis in report["kept"].items() if axis["kind"] == BRANCH and not axis["kept"]]
            rows[name] |= {"learned_share": round(report["learned"], 4), "branches_removed": len(removed)}
            rows[name]["largest_difference_at_surgery"] = max(step["difference"] for step in report["surgeries"])
        print(bench.depth, bench.seed, name, json.dumps(rows[name]), flush=True)
        save()


def summary(seeds: dict[str, Any]) -> dict[str, Any]:
    """Means over the seeds."""
    table: dict[str, Any] = {}
    for name in next(iter(seeds.values()), {}):
        rows = [rows[name] for rows in seeds.values() if name in rows]
        table[name] = {"seeds": len(rows)} | {k: round(mean(r[k] for r in rows), 4) for k in ("accuracy", "macs")}
    return table


def main() -> None:
    """Measures what the results lack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion_mnist", choices=("fashion_mnist", "cifar10"))
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/resnet_sparsity"))
    asked = start(parser)
    warnings.filterwarnings("ignore", module="torch_pruning")
    setting = {"epochs": [FIRST, SPARSE, FINE], "lr": [LR, MORE_LR], "batch": BATCH, "reg": REG, "precision": AMP}
    name = f"{asked.data} resnet{asked.depth}"

    def save() -> None:
        """Only this network's part is replaced: two of them may run side by side."""
        found = {"setting": setting, "summary": summary(seeds), "seeds": seeds}
        nets = {**read(RESULTS).get("networks", {}), name: found}
        write(RESULTS, {**header(f"resnet_sparsity.py --data {asked.data} --depth {asked.depth}"), "networks": nets})

    before = read(RESULTS).get("networks", {}).get(name, {})
    check_setting(before, setting, RESULTS)
    seeds: dict[str, Any] = before.get("seeds", {})
    for seed in range(asked.seeds):
        measure(Bench(asked, seed), seeds.setdefault(str(seed), {}), save)
    print(json.dumps(summary(seeds), indent=1))


if __name__ == "__main__":
    main()
