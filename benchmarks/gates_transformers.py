"""Transformers whose attention and MLP branches are skipped: a BERT-style classifier on SST-2, a vision transformer.

    python benchmarks/gates_transformers.py [--macs 0.7] [--quick]   writes gates_transformers.json

Each trained network is gated by `dc.gate` (gumbel). Accuracy on the test split in float32, for the network as it was
and gated; MACs as counted while predicting; milliseconds per call, static and gated taking turns, and the speed-up over
what the MACs promise. The classifier is trained first, the vision transformer comes trained on digits. What is measured
is not measured again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from bert_sparsity import BATCH, FIRST, LR, trained_first
from common import AMP, QUICK, Benchmark, complete, run_in
from data import splits
from torch import fx

import dyncompress as dc
from dyncompress.compress.evaluation.reports import to_json
from dyncompress.compress.evaluation.wall_clock import latency_inputs, measure_latency
from dyncompress.compress.gates.gate_report import GateReport
from dyncompress.model_zoo import Splits, load
from dyncompress.passes.graph.cost import count_macs

BENCHMARK = Benchmark(
    __file__, __doc__, data=True, within="networks",
    ours="SST-2 {text-encoder sst2/static_accuracy:.1%} -> {text-encoder sst2/accuracy:.1%} at "
    "{text-encoder sst2/macs:.2f} of the MACs; digits {vit-digits/static_accuracy:.1%} -> {vit-digits/accuracy:.1%} at "
    "{vit-digits/macs:.2f}",
)  # fmt: skip
EPOCHS, GATE_LR, TRUNK_LR = 1 if QUICK else 4, 5e-3, 0.1
CALLS = {1: 4} if QUICK else {1: 100, 64: 6}


def classifier() -> tuple[fx.GraphModule, Splits]:
    """The classifier of bert_sparsity.py trained on SST-2, and its data."""
    data = splits("sst2")
    return trained_first(data, 0), data


def vision() -> tuple[fx.GraphModule, Splits]:
    """The vision transformer of the zoo and the digits it was trained on."""
    data = splits("digits")
    return dc.capture(load("vit-digits").eval(), data.train[0][0][None]), data


MODELS = {"text-encoder sst2": classifier, "vit-digits": vision}


def row(make: Callable[[], tuple[fx.GraphModule, Splits]], name: str, macs: float) -> dict[str, Any]:
    """The network before and after."""
    static, data = make()
    training = dc.Training(epochs=EPOCHS, lr=GATE_LR, trunk_lr=TRUNK_LR, batch_size=BATCH, mixed_precision=AMP)
    run, whole = run_in(BENCHMARK.runs / f"gated-{name.split()[0]}", 0), count_macs(static)
    gated = dc.gate(static, data=data, macs=macs, training=training, run=run)
    found = dc.evaluate(gated, data.test)
    assert found.mean_macs is not None
    left = found.mean_macs / whole
    ms = measure_latency({"static": static, "gated": gated.predict}, latency_inputs(data.test, CALLS))
    report = GateReport.of(gated)
    return {
        "static_accuracy": round(dc.evaluate(static, data.test).accuracy, 4),
        "accuracy": round(found.accuracy, 4),
        "macs": round(left, 4),
        "branches": list(report.branches),
        "open": [round(rate, 3) for rate in report.open],
        "settled": to_json(report.settled),
        "by_hardness": [round(sum(rates) / len(rates), 3) for rates in report.by_hardness],
        "ms": {str(size): [round(ms[side][size], 3) for side in ms] for size in CALLS},
        "realised": {str(size): round(ms["static"][size] / ms["gated"][size] * left, 3) for size in CALLS},
    }


def main() -> None:
    """Gates, measures, writes after every network."""
    parser = BENCHMARK.parser()
    parser.add_argument("--macs", type=float, default=0.7)
    asked = BENCHMARK.start(parser)
    setting = {
        "epochs": [FIRST, EPOCHS], "lr": [LR, GATE_LR], "trunk_lr": TRUNK_LR, "batch": BATCH, "precision": AMP,
        "macs": asked.macs,
    }  # fmt: skip
    networks = BENCHMARK.read(setting).get("networks", {})
    complete(
        networks,
        {name: partial(row, make, name, asked.macs) for name, make in MODELS.items()},
        lambda: BENCHMARK.write({"setting": setting, "networks": networks}, f"--macs {asked.macs}"),
    )


if __name__ == "__main__":
    main()
