"""Heads and neurons of a BERT-style classifier, learned away on SST-2 (6,920 sentences).

    python benchmarks/bert_sparsity.py [--seeds 3] [--quick]  writes benchmarks/bert_sparsity.json

    dense       trained, then trained on for as long as the others
    learned     the same trained network: group lasso over attention heads and MLP neurons to half the multiply-adds
    pruned      the same trained network, all its axes cut by magnitude to the same share, trained on as long

Accuracy on the 1,821 test sentences and 872 validation ones in float32; a thousand samples have a standard error of
about one point. Milliseconds per call of 65 words on one thread, the models taking turns, medians. What is measured is
not measured again.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import AMP, QUICK, Benchmark, complete, means, run_in, trained
from data import splits
from torch import fx

import dyncompress as dc
from dyncompress.compress.evaluation.wall_clock import measure_latency
from dyncompress.compress.sparsity.sparsify_report import SparsifyReport
from dyncompress.model_zoo import Splits, build
from dyncompress.passes.graph.copying import deep_copy
from dyncompress.passes.graph.cost import count_macs, count_parameters

BENCHMARK = Benchmark(
    __file__, __doc__, data=True, within="summary",
    published="SST-2 at no loss twice as fast on a GPU, 5 times on a CPU (DynaBERT, Hou et al., NeurIPS 2020)",
    ours="{dense/test_accuracy:.1%} dense, {learned/test_accuracy:.1%} learned at {learned/macs:.2f} of the MACs, "
    "{pruned/test_accuracy:.1%} pruned at {pruned/macs:.2f}",
)  # fmt: skip
FIRST, SPARSE, FINE = (1, 1, 1) if QUICK else (5, 4, 3)
LR, MORE_LR, BATCH, MACS = 1e-3, 5e-4, 64, 0.5
TRAINING = dc.Training(epochs=FIRST, lr=LR, batch_size=BATCH, mixed_precision=AMP)
REPEATS = 2 if QUICK else 40  # of every timed call
KINDS = ("heads", "neurons")


def trained_first(data: Splits, seed: int) -> fx.GraphModule:
    """A BERT-style classifier of sentences."""
    torch.manual_seed(seed)
    net = build("text-encoder", vocabulary=len(data.vocabulary), classes=data.classes)
    gm = dc.capture(net, data.train[0][0][None].repeat(2, 1))
    return trained(gm, data.train, TRAINING, run_in(BENCHMARK.runs / f"first-{seed}", seed))


def make(seed: int, data: Splits) -> dict[str, fx.GraphModule]:
    """The three networks of a seed, each trained or taken from where an interrupted run left it."""
    first = trained_first(data, seed)
    sparse, more = (replace(TRAINING, epochs=epochs, lr=MORE_LR) for epochs in (SPARSE, SPARSE + FINE))

    def train(gm: fx.GraphModule, name: str) -> fx.GraphModule:
        return trained(gm, data.train, more, run_in(BENCHMARK.runs / f"{name}-{seed}", seed))

    learned = dc.sparsify(
        first, data.train, macs=MACS, kinds=KINDS, finetune=FINE, lasso=dc.Lasso(shrink_every=1), training=sparse,
        run=run_in(BENCHMARK.runs / f"learned-{seed}", seed),
    )  # fmt: skip
    pruned = train(dc.prune(first, macs=MACS), "pruned")
    return {"dense": train(deep_copy(first), "dense"), "learned": learned.eval(), "pruned": pruned}


def measure(seed: int, data: Splits) -> dict[str, dict[str, Any]]:
    """Accuracy, size and time of the networks of a seed."""
    models = make(seed, data)
    whole, rows = count_macs(models["dense"]), {}
    ids = torch.stack([data.test[i][0] for i in range(16)])
    taken = measure_latency(models, {batch: [ids[:batch]] for batch in (1, 16)}, REPEATS)
    for name, gm in models.items():
        rows[name] = {
            "test_accuracy": round(dc.evaluate(gm, data.test, batch_size=250).accuracy, 4),
            "validation_accuracy": round(dc.evaluate(gm, data.calibration, batch_size=250).accuracy, 4),
            "macs": round(count_macs(gm) / whole, 4),
            "parameters": count_parameters(gm),
            "heads": [axis.size for axis in dc.infer_axes(gm) if axis.kind == "heads"],
            "neurons": [axis.size for axis in dc.infer_axes(gm) if axis.kind == "neurons"],
            "ms": {str(batch): round(ms, 3) for batch, ms in taken[name].items()},
        }
    report = SparsifyReport.of(models["learned"])
    rows["learned"]["learned_share"] = round(report.learned, 4)
    rows["learned"]["largest_difference_at_surgery"] = max(step.difference for step in report.surgeries)
    return rows


def summary(seeds: Mapping[str, Any]) -> dict[str, Any]:
    """Means over the seeds."""
    figures = ("test_accuracy", "validation_accuracy", "macs")
    names = ("dense", "learned", "pruned")
    return {"seeds": len(seeds)} | {name: means((rows[name] for rows in seeds.values()), *figures) for name in names}


def main() -> None:
    """Measures what the results lack."""
    parser = BENCHMARK.parser()
    parser.add_argument("--seeds", type=int, default=1 if QUICK else 3)
    asked = BENCHMARK.start(parser)
    data = splits("sst2")
    setting = {"epochs": [FIRST, SPARSE, FINE], "lr": [LR, MORE_LR], "batch": BATCH, "macs": MACS, "precision": AMP}
    seeds: dict[str, Any] = BENCHMARK.read(setting).get("seeds", {})
    complete(
        seeds,
        {str(seed): partial(measure, seed, data) for seed in range(asked.seeds)},
        lambda: BENCHMARK.write({"setting": setting, "summary": summary(seeds), "seeds": seeds}),
    )
    print(json.dumps(summary(seeds), indent=1))


if __name__ == "__main__":
    main()
