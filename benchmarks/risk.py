"""Is a promised risk kept? 2,000 simulated calibrations on the cached logits of real converted models.

python benchmarks/risk.py [--names resnet-digits vgg-digits fashion_mnist] [--draws 2000]      writes risk.json

A model gets exits and temperatures from its training and calibration splits, the path comes from the calibration split,
and the test split stands for all data: a calibration draws n of its samples with replacement, and the promise is broken
when the chosen policy's risk on the whole test split is above eps. Beside it the wrong walk, which returns the first
failure. Then the same for real: one half of the test split proves, the other half judges, 100 divisions.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import data as sources
import numpy as np
import torch
from tqdm import tqdm

import dyncompress as dc
from dyncompress.compress.evaluation.evaluate import collect_logits
from dyncompress.compress.thresholds.candidates import Cached
from dyncompress.compress.thresholds.risk import last_passed, losses, p_values, risk_path
from dyncompress.compress.thresholds.thresholds import ThresholdSearch
from dyncompress.model_zoo import zoo as models
from dyncompress.passes.exits.stages import split_stages

DELTA, POINTS = 0.1, 100  # of the curve that the path goes through
CALIBRATION = ("at", "temperature", "ece_before", "ece_after", "ece_floor")
NAMES = ("resnet-digits", "vgg-digits", "fashion_mnist")


def main() -> None:
    """Adds every model's figures to the JSON as soon as they are known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--draws", type=int, default=2000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    target = Path(__file__).with_suffix(".json")
    result: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    for name in given.names:
        if name in sources.NAMES and not sources.available():
            print(f"{name}: no data, left out")
            continue
        begin = time.perf_counter()
        dynamic, splits = converted(name)
        calibrated = dynamic.trunk.meta["info"]["convert"]["exits"]
        rows = [row for labelled in (False, True) for row in simulate(dynamic, splits, labelled, given.draws)]
        result[name] = {"seconds": round(time.perf_counter() - begin, 1), "draws": given.draws, "rows": rows}
        result[name]["calibration"] = [{key: exit[key] for key in CALIBRATION} for exit in calibrated]
        target.write_text(json.dumps(result, indent=1) + "\n")


def converted(name: str) -> tuple[dc.DynamicModel, Any]:
    """A trained dynamic model and its data."""
    if name in sources.NAMES:
        splits = sources.splits(name)
        model = trained_on(splits)
    else:
        splits, model = dc.load_data("digits"), models.load(name)
    return dc.convert(model, exits=3, data=splits, epochs=2, device="cpu"), splits


def trained_on(splits: Any) -> torch.nn.Module:
    """A small convolutional network, trained for two epochs on images of one channel."""
    from torch import nn

    from dyncompress.compress.training.trainer import fit

    torch.manual_seed(0)
    widths, layers, inputs = (16, 16, 32, 32), [], 1
    for k, width in enumerate(widths):
        layers += [nn.Conv2d(inputs, width, 3, 1 + k % 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * inputs, 10))
    fit(model, nn.functional.cross_entropy, splits.train, epochs=2, lr=0.01, batch_size=128, device="cpu")
    return model.eval()


def simulate(dynamic: dc.DynamicModel, splits: Any, labelled: bool, draws: int) -> list[dict[str, Any]]:
    """One row per number of samples and eps."""
    stages = split_stages(dynamic.trunk)
    costs = [s.macs for s in stages], [s.head_macs for s in stages[:-1]]
    tuning = Cached(*collect_logits(dynamic, splits.calibration), *costs)
    test = Cached(*collect_logits(dynamic, splits.test), *costs)
    wanted = tuning.labels if labelled else tuning.logits[-1].argmax(-1)
    policy = dynamic.policy
    calibrated = [z / t for z, t in zip(tuning.logits, (*policy.temperatures, 1.0), strict=True)]
    curve = ThresholdSearch(calibrated, wanted, *costs, rule=policy.rule).curve(POINTS)
    path = risk_path([replace(policy, thresholds=point.thresholds) for point in curve], tuning.logits)
    loss = np.stack([losses(policy, test.logits, test.labels if labelled else None) for policy in path])
    macs = np.array([test.play(policy).mean_cost for policy in path]) / dynamic.static_macs
    rows = []
    for risk, count in ((0.01, 500), (0.01, 1000), (0.02, 1000), (0.05, 500)):
        step, real = walks(loss, risk, count, labelled, draws), divisions(loss, risk, labelled)
        true_risk, failing = loss.mean(1), np.minimum(step + 1, len(loss) - 1)
        rows.append(
            {
                "loss": "accuracy-loss" if labelled else "disagreement",
                "eps": risk,
                "delta": DELTA,
                "samples": count,
                "violations": float((true_risk[step] > risk).mean()),
                "violations_returning_the_first_failure": float((true_risk[failing] > risk).mean()),
                "binomial_error_of_delta": round(math.sqrt(DELTA * (1 - DELTA) / draws), 4),
                "mean_true_risk": float(true_risk[step].mean()),
                "mean_macs_share": float(macs[step].mean()),
                "violations_on_the_other_half": real,
            }
        )
        print(json.dumps(rows[-1]))
    return rows


def walks(loss: np.ndarray, risk: float, count: int, signed: bool, draws: int) -> np.ndarray:
    """The step returned in each draw."""
    random, steps = np.random.default_rng(0), []
    for _ in tqdm(range(draws), desc=f"eps {risk:g}, n {count}", leave=False):
        rows = random.integers(0, loss.shape[1], count)
        steps.append(last_passed(p_values(loss[:, rows], risk, DELTA, signed=signed), DELTA))
    return np.array(steps)


def divisions(loss: np.ndarray, risk: float, signed: bool, times: int = 100) -> float:
    """How often the other half of the test split sees a risk above eps: also by its own chance, not only the walk's."""
    random, broken = np.random.default_rng(1), 0
    for _ in range(times):
        one, other = np.array_split(random.permutation(loss.shape[1]), 2)
        step = last_passed(p_values(loss[:, one], risk, DELTA, signed=signed), DELTA)
        broken += loss[step, other].mean() > risk
    return broken / times


if __name__ == "__main__":
    main()
