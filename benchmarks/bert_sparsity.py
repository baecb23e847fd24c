"""Heads and neurons of a BERT-style classifier, learned away on SST-2 (6,920 sentences).

    python benchmarks/bert_sparsity.py [--seeds 3] [--out FOLDER]        writes benchmarks/bert_sparsity.json

    dense       trained, then trained on for as long as the others
    learned     the same trained network: group lasso over attention heads and MLP neurons to half the multiply-adds
    pruned      the same trained network, all its axes cut by magnitude to the same share, trained on as long

Accuracy on the 1,821 test sentences and 872 validation ones in float32; a thousand samples have a standard error of
about one point. Milliseconds per call of 65 words on one thread, the models taking turns, medians. What is measured is
not measured again.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import AMP, check_setting, header, read, start, write
from data import splits
from torch import fx

import dyncompress as dc
from dyncompress.compress.evaluation.wall_clock import measure_latency
from dyncompress.compress.training.losses import cross_entropy
from dyncompress.compress.training.trainer import fit
from dyncompress.model_zoo import build
from dyncompress.passes.graph.copying import deep_copy
from dyncompress.passes.graph.cost import count_macs, count_parameters

RESULTS = Path(__file__).with_suffix(".json")
FIRST, SPARSE, FINE = 5, 4, 3
LR, MORE_LR, BATCH, MACS = 1e-3, 5e-4, 64, 0.5
REPEATS = 40  # of every timed call
KINDS = ("heads", "neurons")


def make(seed: int, out: Path, data: Any) -> dict[str, fx.GraphModule]:
    """The three networks of a seed, each trained or taken from where an interrupted run left it."""
    options: dict[str, Any] = {"batch_size": BATCH, "seed": seed, "mixed_precision": AMP, "progress": True}

    def train(gm: fx.GraphModule, name: str, epochs: int, lr: float) -> fx.GraphModule:
        run = out / f"{name}-{seed}"
        fit(gm, cross_entropy, data.train, epochs=epochs, lr=lr, run_dir=run, resume=run.exists(), **options)
        return gm

    torch.manual_seed(seed)
    net = build("text-encoder", vocabulary=len(data.vocabulary), classes=data.classes)
    first = train(dc.capture(net, data.train[0][0][None].repeat(2, 1)), "first", FIRST, LR)
    run, more = out / f"learned-{seed}", SPARSE + FINE
    learned = dc.sparsify(
        first, data.train, macs=MACS, kinds=KINDS, epochs=SPARSE, finetune=FINE, shrink_every=1, lr=MORE_LR,
        run_dir=run, resume=run.exists(), **options,
    )  # fmt: skip
    pruned = train(dc.prune(first, macs=MACS), "pruned", more, MORE_LR)
    return {"dense": train(deep_copy(first), "dense", more, MORE_LR), "learned": learned, "pruned": pruned}


def measure(models: Mapping[str, fx.GraphModule], data: Any) -> dict[str, dict[str, Any]]:
    """Accuracy, size and time of the networks of a seed."""
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
    report = models["learned"].meta["info"]["sparsify"]
    rows["learned"]["learned_share"] = round(report["learned"], 4)
    rows["learned"]["largest_difference_at_surgery"] = max(step["difference"] for step in report["surgeries"])
    return rows


def summary(seeds: Mapping[str, Any]) -> dict[str, Any]:
    """Means over the seeds."""
    table: dict[str, Any] = {"seeds": len(seeds)}
    for name in ("dense", "learned", "pruned"):
        table[name] = {
            key: round(mean(rows[name][key] for rows in seeds.values()), 4)
            for key in ("test_accuracy", "validation_accuracy", "macs")
        }
    return table


def main() -> None:
    """Measures what the results lack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bert_sparsity"))
    asked = start(parser)
    data = splits("sst2")
    setting = {"epochs": [FIRST, SPARSE, FINE], "lr": [LR, MORE_LR], "batch": BATCH, "macs": MACS, "precision": AMP}
    found = read(RESULTS)
    check_setting(found, setting, RESULTS)
    seeds: dict[str, Any] = found.get("seeds", {})
    for seed in range(asked.seeds):
        if str(seed) in seeds:
            continue
        models = {name: gm.eval() for name, gm in make(seed, asked.out, data).items()}
        seeds[str(seed)] = measure(models, data)
        print(seed, json.dumps(seeds[str(seed)]), flush=True)
        write(RESULTS, {**header("bert_sparsity.py"), "setting": setting, "summary": summary(seeds), "seeds": seeds})
    print(json.dumps(summary(seeds), indent=1))


if __name__ == "__main__":
    main()
