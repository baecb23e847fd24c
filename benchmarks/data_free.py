"""What conversion costs without data, or with a few labelled samples of every class.

python benchmarks/data_free.py [--names vgg-digits resnet-digits fashion_mnist] [--rows ...] [--quick]
                                                                                             writes data_free.json

Three exits on a frozen trunk, in bf16, each row trained on 4 times 4,096 samples or blends: with data; without, twice
as many blends; with k samples per class, as blends (`shots=k`) and plainly (the samples themselves, as often). Two
figures at 0.6 of the static model's MACs: `at_0.6`, with thresholds chosen on the test split itself, judges the exits
alone; `chosen`, with those that the conversion chose for that budget, is what a user gets. A row that the JSON has is
left out.
"""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import QUICK, Benchmark, complete
from data import present, splits, take
from few_shot import BUDGET, judged
from torch.utils.data import ConcatDataset, Dataset

import dyncompress as dc
from dyncompress.compress.evaluation.evaluate import evaluate
from dyncompress.compress.synthesis import few_samples
from dyncompress.compress.synthesis.impressions import Synthesis
from dyncompress.compress.training.trainer import fit
from dyncompress.model_zoo import build
from dyncompress.model_zoo import zoo as models
from dyncompress.model_zoo.load_data import Splits

BENCHMARK = Benchmark(
    __file__, __doc__, within="vgg-digits",
    ours="VGG on digits at .6 of its MACs: {data/at_0.6:.1%} with data, {free/at_0.6:.1%} without, "
    "{5 shots/at_0.6:.1%} with 5 samples a class",
)  # fmt: skip
NAMES = ("vgg-digits", "resnet-digits", "fashion_mnist")
SHOTS = (1, 5, 20)
ROWS = ("data", "free", *(f"{k} shots{how}" for k in SHOTS for how in ("", ", plain")))
EPOCHS, EPOCH = (1, 256) if QUICK else (4, few_samples.EPOCH)
TRAINED, TESTED = 20_000, 1500  # samples of the Fashion-MNIST network, and that every row is judged on


def main() -> None:
    """Adds every row to the JSON as soon as it is known."""
    parser = BENCHMARK.parser()
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES[:1] if QUICK else NAMES)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=("data", "1 shots, plain") if QUICK else ROWS)
    parser.add_argument("--impressions", type=int, default=Synthesis.count)
    given = BENCHMARK.start(parser)
    result = BENCHMARK.read()
    for name in present(given.names):
        rows = result.setdefault(name, {})
        if not rows.keys() >= set(given.rows):
            model, data = subject(name)
            measures = {row: partial(measured, row, model, data, given.impressions) for row in given.rows}
            complete(rows, measures, partial(BENCHMARK.write, result))


def subject(name: str) -> tuple[torch.nn.Module, Splits]:
    """A trained network and its data; on Fashion-MNIST a ResNet-20, trained on 20,000 samples twice."""
    if name in models.ZOO:
        return models.load(name), splits("digits")
    data = splits(name)
    torch.manual_seed(0)
    model, some = build("resnet20-cifar", channels=1), take(data.train, TRAINED)
    training = dc.Training(epochs=2, lr=0.01, mixed_precision="bf16")
    fit(model, torch.nn.functional.cross_entropy, some, training, dc.Run(device="cpu"))
    return model.eval(), data


def measured(row: str, model: torch.nn.Module, data: Splits, impressions: int) -> dict[str, Any]:
    """The figures of one row; seconds are the processor's."""
    begin = time.process_time()
    dynamic = converted(row, model, data, impressions)
    seconds = round(time.process_time() - begin, 1)
    test = take(data.test, TESTED)
    found = evaluate(dynamic, test)
    assert found.mean_macs is not None
    return {
        **judged(dynamic, test),
        "chosen": {"accuracy": round(found.accuracy, 4), "macs_share": round(found.mean_macs / dynamic.static_macs, 3)},
        "seconds": seconds,
        **({"impressions": impressions} if row == "free" else {}),
    }


def converted(row: str, model: torch.nn.Module, data: Splits, impressions: int) -> dc.DynamicModel:
    """The model as the row says."""
    training = dc.Training(epochs=EPOCHS, mixed_precision="bf16")
    convert = partial(dc.convert, model, macs=BUDGET, training=training, run=dc.Run(device="cpu"))
    if row == "free":
        return convert(torch.zeros(2, *data.train[0][0].shape), samples=dc.Samples(impressions=impressions))
    if row == "data":
        return convert(data=replace(data, train=take(data.train, EPOCH)))
    shots = int(row.split()[0])
    if not row.endswith("plain"):
        return convert(data=data, samples=dc.Samples(shots=shots))
    few = few_samples.few_shots(data.train, shots, data.classes, 0)
    often: Dataset[Any] = ConcatDataset([few] * (EPOCH // len(few)))
    return convert(data=replace(data, train=often))


if __name__ == "__main__":
    main()
