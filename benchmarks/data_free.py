"""What conversion costs without data, or with a few labelled samples of every class.

python benchmarks/data_free.py [--names vgg-digits resnet-digits fashion_mnist] [--rows ...]     writes data_free.json

Three exits on a frozen trunk, in bf16, each row trained on 4 times 4,096 samples or blends: with data; without, twice
as many blends; with k samples per class, as blends (`shots=k`) and plainly (the samples themselves, as often). Two
figures at 0.6 of the static model's MACs: `at_0.6`, with thresholds chosen on the test split itself, judges the exits
alone; `chosen`, with those that the conversion chose for that budget, is what a user gets. A row that the JSON has is
left out.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import data as sources
import torch
from common import read, write
from torch.utils.data import ConcatDataset, Dataset, Subset

import dyncompress as dc
from dyncompress.compress.evaluation.evaluate import evaluate
from dyncompress.compress.synthesis.few_samples import EPOCH, few_shots
from dyncompress.compress.synthesis.impressions import Synthesis
from dyncompress.compress.thresholds.candidates import collect_cached
from dyncompress.compress.thresholds.thresholds import ThresholdSearch
from dyncompress.compress.training.trainer import fit
from dyncompress.model_zoo import build
from dyncompress.model_zoo import zoo as models
from dyncompress.model_zoo.load_data import Splits

NAMES = ("vgg-digits", "resnet-digits", "fashion_mnist")
SHOTS = (1, 5, 20)
ROWS = ("data", "free", *(f"{k} shots{how}" for k in SHOTS for how in ("", ", plain")))
BUDGET, EPOCHS = 0.6, 4
TRAINED, TESTED = 20_000, 1500  # samples of the Fashion-MNIST network, and that every row is judged on


def main() -> None:
    """Adds every row to the JSON as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--impressions", type=int, default=Synthesis.count)
    given = parser.parse_args()
    torch.set_num_threads(1)
    target = Path(__file__).with_suffix(".json")
    result = read(target)
    for name in given.names:
        rows = result.setdefault(name, {})
        missing = [row for row in given.rows if row not in rows]
        if not missing or (name in sources.NAMES and not sources.available()):
            print(f"{name}: nothing to do, or no data")
            continue
        model, splits = subject(name)
        for row in missing:
            rows[row] = measured(row, model, splits, given.impressions)
            print(name, row, json.dumps(rows[row]), flush=True)
            write(target, result)


def subject(name: str) -> tuple[torch.nn.Module, Splits]:
    """A trained network and its data; on Fashion-MNIST a ResNet-20, trained on 20,000 samples twice."""
    if name not in sources.NAMES:
        return models.load(name), dc.load_data("digits")
    splits = sources.splits(name)
    torch.manual_seed(0)
    model, some = build("resnet20-cifar", channels=1), Subset(splits.train, range(TRAINED))
    fit(model, torch.nn.functional.cross_entropy, some, epochs=2, lr=0.01, mixed_precision="bf16", device="cpu")
    return model.eval(), splits


def measured(row: str, model: torch.nn.Module, splits: Splits, impressions: int) -> dict[str, Any]:
    """The figures of one row; seconds are the processor's."""
    begin = time.process_time()
    options: dict[str, Any] = {"exits": 3, "macs": BUDGET, "epochs": EPOCHS, "mixed_precision": "bf16", "device": "cpu"}
    if row == "free":
        options["impressions"] = impressions
    dynamic = converted(row, model, splits, **options)
    seconds = round(time.process_time() - begin, 1)
    test = Subset(splits.test, range(TESTED))
    cached = collect_cached(dynamic, test)
    search = ThresholdSearch(cached.logits, cached.labels, cached.stage_costs, cached.head_costs)
    found = evaluate(dynamic, test)
    assert found.mean_macs is not None
    return {
        f"at_{BUDGET}": round(search.for_cost(BUDGET * dynamic.static_macs).accuracy, 4),
        "chosen": {"accuracy": round(found.accuracy, 4), "macs_share": round(found.mean_macs / dynamic.static_macs, 3)},
        "exits": [round(right, 4) for right in cached.right.mean(1).tolist()],
        "seconds": seconds,
        **({"impressions": impressions} if row == "free" else {}),
    }


class Parts(NamedTuple):
    """Other training data beside the same calibration split."""

    train: Dataset[Any]
    calibration: Dataset[Any]


def converted(row: str, model: torch.nn.Module, splits: Splits, **options: Any) -> dc.DynamicModel:
    """The model as the row says."""
    if row == "free":
        return dc.convert(model, torch.zeros(2, *splits.train[0][0].shape), **options)
    if row == "data":
        return dc.convert(model, data=Parts(Subset(splits.train, range(EPOCH)), splits.calibration), **options)
    shots = int(row.split()[0])
    if not row.endswith("plain"):
        return dc.convert(model, data=splits, shots=shots, **options)
    few = few_shots(splits.train, shots, splits.classes, 0)
    often = ConcatDataset([few] * (EPOCH // len(few)))
    return dc.convert(model, data=Parts(often, splits.calibration), **options)


if __name__ == "__main__":
    main()
