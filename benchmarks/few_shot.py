"""Exits that learn from k labelled samples of every class: plainly, distilled from blends, or meta-learned.

    python benchmarks/few_shot.py [--names vgg-digits resnet-digits] [--seeds 3] [--quick]   writes few_shot.json

Three exits on a frozen trunk. A row's figures are of 600 test samples: the accuracy of every exit, and of the dynamic
model at 0.6 of the static model's MACs with thresholds chosen on these samples, which judges the exits alone.

    ce        recipe "sum" on the samples, 64 epochs
    ce, sgd   the same heads and samples, 64 epochs of SGD with momentum, as "meta" has, instead of AdamW
    distill   recipe "distill" on blends, 2 epochs of 4,096
    meta      recipe "meta", 2 epochs of 2,048 samples in episodes

What the JSON has is not measured again.
"""

import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import QUICK, Benchmark, complete
from data import splits, take
from torch import fx
from torch.utils.data import Dataset

import dyncompress as dc
from dyncompress.compress.exits.exit_losses import Weighted
from dyncompress.compress.exits.meta_exits import Heads, Read
from dyncompress.compress.exits.recipes import train_exits
from dyncompress.compress.options.choices import ExitRecipe
from dyncompress.compress.synthesis.few_samples import few_shot_training
from dyncompress.compress.thresholds.candidates import collect_cached
from dyncompress.compress.thresholds.thresholds import ThresholdSearch
from dyncompress.compress.training.batches import examples_of
from dyncompress.compress.training.trainer import fit
from dyncompress.model_zoo import Splits, load
from dyncompress.passes.exits.insert_exits import InsertExits

BENCHMARK = Benchmark(
    __file__, __doc__, within="mean",
    ours="VGG, one sample a class, at .6 of the MACs: {vgg-digits, 1 shots, ce/at_0.6:.1%} plainly, "
    "{vgg-digits, 1 shots, distill/at_0.6:.1%} distilled, {vgg-digits, 1 shots, meta/at_0.6:.1%} meta-learned",
)  # fmt: skip
NAMES, SHOTS = ("vgg-digits", "resnet-digits"), (1,) if QUICK else (1, 5, 20)
RECIPES: dict[str, tuple[ExitRecipe, int]] = {
    "ce": ("sum", 64),
    "ce, sgd": ("sum", 64),
    "distill": ("distill", 2),
    "meta": ("meta", 2),
}
if QUICK:
    RECIPES = {"ce": ("sum", 1), "ce, sgd": ("sum", 1)}
LR, BATCH, EXITS, TESTED, BUDGET = 1e-2, 128, 3, 600, 0.6


def main() -> None:
    """Adds every row to the JSON as soon as it is known."""
    parser = BENCHMARK.parser()
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES[:1] if QUICK else NAMES)
    parser.add_argument("--seeds", type=int, default=1 if QUICK else 3)
    given = BENCHMARK.start(parser)
    data, runs = splits("digits"), BENCHMARK.read().get("runs", {})
    graphs = {name: dc.capture(load(name), examples_of(data.train)) for name in given.names}
    measures = {
        f"{name}, {shots} shots, {row}, seed {seed}": partial(measured, row, graph, data, shots, seed)
        for seed in range(given.seeds)
        for name, graph in graphs.items()
        for shots in SHOTS
        for row in RECIPES
    }
    complete(runs, measures, lambda: BENCHMARK.write({"mean": means(runs), "runs": runs}))


def measured(row: str, graph: fx.GraphModule, data: Splits, shots: int, seed: int) -> dict[str, Any]:
    """The figures of one row; seconds are the processor's."""
    torch.manual_seed(seed)
    dynamic = dc.DynamicModel(InsertExits(EXITS)(graph).gm).eval()
    begin = time.process_time()
    train(row, dynamic, data, shots, seed)
    seconds = round(time.process_time() - begin, 1)
    return {**judged(dynamic, take(data.test, TESTED)), "seconds": seconds}


def judged(dynamic: dc.DynamicModel, test: Dataset[Any]) -> dict[str, Any]:
    """Accuracy within the budget, thresholds chosen on the same samples at no temperature, and of every exit."""
    cached = collect_cached(dynamic, test)
    search = ThresholdSearch(cached.logits, cached.labels, cached.stage_costs, cached.head_costs)
    found = search.for_cost(BUDGET * dynamic.static_macs).accuracy
    return {f"at_{BUDGET}": round(found, 4), "exits": [round(right, 4) for right in cached.right.mean(1).tolist()]}


def train(row: str, dynamic: dc.DynamicModel, data: Splits, shots: int, seed: int) -> None:
    """The exits, in place."""
    recipe, epochs = RECIPES[row]
    few = few_shot_training(data.train, shots, dynamic, recipe, seed)
    training, run = dc.Training(epochs=epochs, lr=LR, trunk_lr=0.0, batch_size=BATCH), dc.Run(seed=seed, device="cpu")
    if row != "ce, sgd":
        train_exits(dynamic, few, recipe, training, run)
        return
    heads, read = Heads(dynamic.trunk), Read.by(dynamic, few, BATCH, "cpu")
    fit(heads, Weighted([1.0] * EXITS), read, replace(training, optimizer="sgd"), run, parameters=heads.own())


def means(runs: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of accuracy within the budget, and the mean of the early exits."""
    found: dict[str, list[Any]] = {}
    for key, figures in runs.items():
        found.setdefault(key.rpartition(", seed")[0], []).append(figures)
    return {
        key: {
            f"at_{BUDGET}": round(statistics.fmean(f[f"at_{BUDGET}"] for f in rows), 4),
            "sd": round(statistics.pstdev(f[f"at_{BUDGET}"] for f in rows), 4),
            "exits": [round(statistics.fmean(e), 4) for e in zip(*(f["exits"] for f in rows), strict=True)],
            "seconds": round(statistics.fmean(f["seconds"] for f in rows), 1),
            "seeds": len(rows),
        }
        for key, rows in found.items()
    }


if __name__ == "__main__":
    main()
