"""What growing batches change while a small residual network learns its structure: seconds, memory, accuracy.

    python benchmarks/batch_growth.py [--quick]   writes batch_growth.json

A ResNet-8 on the embedded digits, trained as it shrinks to a share of its multiply-adds, with and without `grow_batch`,
from the same weights. For every epoch: the batch, the median step and all its steps in seconds of the processor (one
thread), and the bytes that autograd keeps for the backward pass of a step, counted as they are saved, weights included.
"""

import json
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from statistics import mean, median
from typing import Any

import torch
from common import QUICK, Benchmark, complete
from data import splits, take
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import dyncompress as dc
from dyncompress.compress.sparsity.sparsify_report import SparsifyReport
from dyncompress.compress.training.losses import cross_entropy
from dyncompress.compress.training.trainer import Optimizer
from dyncompress.model_zoo import Splits, build

BENCHMARK = Benchmark(
    __file__, __doc__, within="summary",
    published="the batch grows as memory frees (PruneTrain, Lym et al., SC 2019)",
    ours="SGD: {sgd growing/steps} steps for {sgd fixed/steps}, {sgd growing/cpu_s:.0f} s for {sgd fixed/cpu_s:.0f}, "
    "accuracy {sgd growing/accuracy:.1%} for {sgd fixed/accuracy:.1%}",
)  # fmt: skip
TRAIN, TEST, SEEDS = (256, 256, 1) if QUICK else (2560, 1600, 2)
OPTIMIZERS: dict[str, tuple[Optimizer, float]] = {
    "sgd": (partial(torch.optim.SGD, momentum=0.9), 0.05),
    "adamw": (torch.optim.AdamW, 2e-3),
}
MACS, EPOCHS, FINE, BATCH = 0.25, 1 if QUICK else 6, 1 if QUICK else 4, 64


class Watch:
    """A loss that notes each step: its samples, when it came (processor seconds), the bytes kept by then."""

    def __init__(self) -> None:
        self.kept: dict[int, torch.UntypedStorage] = {}
        self.steps: list[tuple[int, float, int]] = []

    def pack(self, tensor: Tensor) -> Tensor:
        self.kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    def __call__(self, output: Any, labels: Tensor) -> Tensor:
        value = cross_entropy(output, labels)
        bytes_kept = sum(storage.nbytes() for storage in self.kept.values())
        self.steps.append((len(labels), time.process_time(), bytes_kept))
        self.kept.clear()
        return value


def epochs_of(watch: Watch, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """One row per epoch."""
    rows, at = [], 0
    for size in sizes:
        steps = watch.steps[at : at + TRAIN // size]
        at += len(steps)
        step = median(b[1] - a[1] for a, b in pairwise(steps))
        row = {"batch": size, "steps": len(steps), "step_ms": round(1e3 * step, 1)}
        rows.append(row | {"epoch_s": round(step * len(steps), 2), "saved_bytes": max(kept for *_, kept in steps)})
    return rows


def measure(name: str, seed: int, grow: bool, data: Splits) -> dict[str, Any]:
    """One training."""
    torch.manual_seed(seed)
    model = build("resnet20-cifar", channels=1, depth=8)
    optimizer, lr = OPTIMIZERS[name]
    train, test = take(data.train, TRAIN), take(data.test, TEST)
    watch, began = Watch(), time.process_time()
    with saved_tensors_hooks(watch.pack, lambda tensor: tensor):
        small = dc.sparsify(
            model, train, loss_fn=watch, macs=MACS, finetune=FINE, lasso=dc.Lasso(shrink_every=1, grow_batch=grow),
            training=dc.Training(epochs=EPOCHS, lr=lr, batch_size=BATCH, optimizer=optimizer),
            run=dc.Run(seed=seed, device="cpu"),
        )  # fmt: skip
    seconds = time.process_time() - began
    report = SparsifyReport.of(small)
    row = {"cpu_s": round(seconds, 1), "accuracy": round(dc.evaluate(small.eval(), test, batch_size=200).accuracy, 4)}
    row |= {"learned": round(report.learned, 4), "left": round(report.left, 4)}
    return row | {"epochs": epochs_of(watch, report.batch_sizes)}


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """Means over the seeds: accuracy, seconds of all, of a finetuning epoch and its peak bytes."""
    found = {}
    for kind in dict.fromkeys(key.rpartition(" ")[0] for key in runs):
        rows = [row for key, row in runs.items() if key.startswith(kind)]
        last = [row["epochs"][-1] for row in rows]
        found[kind] = {
            "accuracy": round(mean(row["accuracy"] for row in rows), 4),
            "cpu_s": round(mean(row["cpu_s"] for row in rows), 1),
            "batch": round(mean(row["batch"] for row in last)),
            "steps": round(mean(sum(epoch["steps"] for epoch in row["epochs"]) for row in rows)),
            "last_epoch_s": round(mean(row["epoch_s"] for row in last), 2),
            "first_bytes": max(row["epochs"][0]["saved_bytes"] for row in rows),
            "last_bytes": max(row["saved_bytes"] for row in last),
        }
    return found


def main() -> None:
    """Measures what the results lack."""
    BENCHMARK.start()
    setting = {
        "train": TRAIN, "test": TEST, "seeds": SEEDS, "macs": MACS, "epochs": EPOCHS, "finetune": FINE,
        "shrink_every": 1, "batch_size": BATCH,
    }  # fmt: skip
    data, runs = splits("digits"), BENCHMARK.read(setting).get("runs", {})
    measures = {
        f"{name} {way} {seed}": partial(measure, name, seed, way == "growing", data)
        for seed in range(SEEDS)
        for name in OPTIMIZERS
        for way in ("fixed", "growing")
    }
    complete(runs, measures, lambda: BENCHMARK.write({"setting": setting, "summary": summary(runs), "runs": runs}))
    print(json.dumps(summary(runs), indent=1))


if __name__ == "__main__":
    main()
