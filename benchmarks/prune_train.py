"""Shrinking while training against dense training: total time and accuracy (PruneTrain, Lym et al., SC 2019).

    python benchmarks/prune_train.py [--data fashion_mnist] [--depth 20] [--seeds 2] [--quick]   writes prune_train.json

Both start at the same random weights and train for as many epochs, on the same batches with the same schedule:

    dense       as it is
    shrinking   group lasso over all axes towards a share of the multiply-adds; zeroed groups leave after every epoch,
                in eights, which the processor's kernels like

Both have their convolutions in channels last, in which these are fastest, of odd widths above all.

Seconds are those of the whole training on one thread, surgeries and the choice of lambda included, of the processor
(the machine may be shared) and of the clock; the two take turns in going first.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import mean, median
from typing import Any

from common import AMP, QUICK, RESIDUAL, Benchmark, channels_last, complete, residual
from data import splits
from torch import fx

import dyncompress as dc
from dyncompress.compress.evaluation.reports import to_json
from dyncompress.compress.sparsity.sparsify_report import SparsifyReport
from dyncompress.compress.training.losses import cross_entropy
from dyncompress.compress.training.trainer import fit
from dyncompress.model_zoo import Splits
from dyncompress.passes.graph.copying import deep_copy
from dyncompress.passes.graph.cost import count_macs, count_parameters

BENCHMARK = Benchmark(
    __file__, __doc__, data=True, within="summary",
    published="39 % less training time, ResNet-50 on ImageNet (PruneTrain)",
    ours="{time_ratio/clock_s:.2f} of the training time, accuracy {accuracy/dense:.1%} -> {accuracy/shrinking:.1%}",
)  # fmt: skip
EPOCHS, LEARNING = (2, 1) if QUICK else (10, 3)
MACS, LIMITS = 0.25, dc.Limits(floor=0.1, round_to=8)


def trained(train: Callable[[], fx.GraphModule], test: Any, whole: int) -> dict[str, Any]:
    """What one way of training takes and gives."""
    cpu, clock = time.process_time(), time.perf_counter()
    gm = train()
    seconds = {"cpu_s": round(time.process_time() - cpu, 1), "clock_s": round(time.perf_counter() - clock, 1)}
    row = {**seconds, "accuracy": round(dc.evaluate(gm.eval(), test, batch_size=250).accuracy, 4)}
    row |= {"macs": round(count_macs(gm) / whole, 4), "parameters": count_parameters(gm)}
    if SparsifyReport.is_in(gm):
        row["surgeries"] = to_json(SparsifyReport.of(gm).surgeries)
    return row


def measure(data: Splits, depth: int, seed: int) -> dict[str, Any]:
    """Both ways, from the same weights."""
    start = channels_last(dc.capture(residual(depth, data, seed), data.train[0][0][None]))
    run = dc.Run(seed=seed, progress=True)

    def dense() -> fx.GraphModule:
        gm = deep_copy(start)
        fit(gm, cross_entropy, data.train, replace(RESIDUAL, epochs=EPOCHS), run)
        return gm

    def shrinking() -> fx.GraphModule:
        return dc.sparsify(
            start, data.train, macs=MACS, finetune=EPOCHS - LEARNING, lasso=dc.Lasso(shrink_every=1), limits=LIMITS,
            training=replace(RESIDUAL, epochs=LEARNING), run=run,
        )  # fmt: skip

    ways = {"dense": dense, "shrinking": shrinking}
    order = list(ways) if seed % 2 == 0 else list(ways)[::-1]
    rows = {name: trained(ways[name], data.test, count_macs(start)) for name in order}
    ratios = {key: round(rows["shrinking"][key] / rows["dense"][key], 3) for key in ("cpu_s", "clock_s")}
    return {**rows, "time_ratio": ratios}


def summary(seeds: dict[str, Any]) -> dict[str, Any]:
    """Medians of the time ratios, means of the accuracies."""
    return {
        "seeds": len(seeds),
        "time_ratio": {key: median(s["time_ratio"][key] for s in seeds.values()) for key in ("cpu_s", "clock_s")},
        "accuracy": {key: round(mean(s[key]["accuracy"] for s in seeds.values()), 4) for key in ("dense", "shrinking")},
    }


def main() -> None:
    """Measures what the results lack."""
    parser = BENCHMARK.parser()
    parser.add_argument("--data", default="fashion_mnist", choices=("fashion_mnist", "cifar10"))
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1 if QUICK else 2)
    asked = BENCHMARK.start(parser)
    setting = {
        "data": asked.data, "depth": asked.depth, "epochs": EPOCHS, "learning": LEARNING, "macs": MACS,
        "lr": RESIDUAL.lr, "batch": RESIDUAL.batch_size, "precision": AMP, "round_to": LIMITS.round_to,
        "channels_last": True,
    }  # fmt: skip
    data, seeds = splits(asked.data), BENCHMARK.read(setting).get("seeds", {})
    complete(
        seeds,
        {str(seed): partial(measure, data, asked.depth, seed) for seed in range(asked.seeds)},
        lambda: BENCHMARK.write({"setting": setting, "summary": summary(seeds), "seeds": seeds}),
    )
    print(json.dumps(summary(seeds), indent=1))


if __name__ == "__main__":
    main()
