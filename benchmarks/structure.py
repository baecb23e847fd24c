"""Why structure wins: structured pruning, low rank and single zeros at equal parameters, accuracy against wall clock.

    python benchmarks/structure.py      writes benchmarks/structure.json and benchmarks/structure-MODEL.png

One epoch of fine-tuning each, one thread, on the first samples of the embedded digits.
"""

from pathlib import Path

import torch
from common import write
from torch.utils.data import Subset

import dyncompress as dc
from dyncompress.cli.report.plots import plot_methods
from dyncompress.compress.evaluation.reports import to_json
from dyncompress.model_zoo.zoo import load

MODELS = ("vgg-digits", "lstm-digits")
SHARES = (0.5, 0.25)
TRAIN, TEST = 2560, 1200  # samples: minutes on one core


def main() -> None:
    torch.set_num_threads(1)
    path, report = Path(__file__).with_suffix(".json"), {}
    data = dc.load_data("digits")
    train, test = Subset(data.train, range(TRAIN)), Subset(data.test, range(TEST))
    for name in MODELS:
        found = dc.compare(load(name), train, test, shares=SHARES, device="cpu", progress=True)
        report[name] = {**to_json(found.entries), "left_out": found.left_out}
        plot_methods(path.with_name(f"structure-{name}.png"), found.entries)
        for entry, values in found.entries.items():
            print(f"{name} {entry}: {100 * (values.accuracy or 0):.2f} %, {values.latency_ms['1']:.2f} ms", flush=True)
    write(path, {"torch": torch.__version__, "train": TRAIN, "test": TEST, "models": report})


if __name__ == "__main__":
    main()
