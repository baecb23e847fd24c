"""Why structure wins: structured pruning, low rank and single zeros at equal parameters, accuracy against wall clock.

    python benchmarks/structure.py [--quick]   writes benchmarks/structure.json and structure-MODEL.png

One epoch of fine-tuning each, one thread, on the first samples of the embedded digits.
"""

from common import QUICK, Benchmark
from data import splits, take

import dyncompress as dc
from dyncompress.cli.report.plots import plot_methods
from dyncompress.compress.evaluation.reports import to_json
from dyncompress.model_zoo.zoo import load

BENCHMARK = Benchmark(
    __file__, __doc__, within="models/vgg-digits",
    published="AlexNet's convolutions 5.1 times as fast on a CPU, about twice what single zeros give (SSL, Wen et al.)",
    ours="VGG at half its parameters: {structured-0.5/latency_ms/1:.1f} ms a call, {low-rank-0.5/latency_ms/1:.1f} by "
    "low rank, {unstructured-0.5-sparse/latency_ms/1:.1f} by single zeros; {static/latency_ms/1:.1f} whole",
)  # fmt: skip
MODELS = ("lstm-digits",) if QUICK else ("vgg-digits", "lstm-digits")
SHARES = (0.5,) if QUICK else (0.5, 0.25)
TRAIN, TEST = 2560, 1200  # samples: minutes on one core


def main() -> None:
    """Compares, draws, writes."""
    BENCHMARK.start()
    report, data = {}, splits("digits")
    train, test = take(data.train, TRAIN), take(data.test, TEST)
    for name in MODELS:
        found = dc.compare(load(name), train, test, shares=SHARES, run=dc.Run(device="cpu", progress=True))
        report[name] = {**to_json(found.entries), "left_out": found.left_out}
        plot_methods(BENCHMARK.folder / f"structure-{name}.png", found.entries)
        for entry, values in found.entries.items():
            print(f"{name} {entry}: {100 * (values.accuracy or 0):.2f} %, {values.latency_ms['1']:.2f} ms", flush=True)
    BENCHMARK.write({"train": TRAIN, "test": TEST, "models": report})


if __name__ == "__main__":
    main()
