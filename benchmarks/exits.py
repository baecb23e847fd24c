"""Training recipes of early exits side by side: accuracy against mean MACs and against measured time.

    python benchmarks/exits.py [--data fashion_mnist] [--net resnet20-cifar] [--seeds 1]      writes exits.json

A network is trained once per seed; every recipe then puts three exits into a copy of it and trains them for as many
epochs, on a frozen trunk or together with it. Thresholds are those that lose at most half a point on the calibration
split; budgets are met there, too. Everything else is of the test split. Milliseconds on one thread, static and dynamic
taking turns; 1, 16 and 256 samples a call. What is measured is not measured again.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import AMP, BATCH, FIRST, LR, SGD, check_setting, header, read, start, write
from data import splits
from torch import nn

import dyncompress as dc
from dyncompress.compress.candidates import Cached, collect_cached
from dyncompress.compress.evaluate import latency_inputs, measure_latency
from dyncompress.compress.losses import cross_entropy
from dyncompress.compress.thresholds import ThresholdSearch
from dyncompress.compress.trainer import fit
from dyncompress.model_zoo import build

RESULTS = Path(__file__).with_suffix(".json")
EPOCHS, EXITS, TRUNK_LR = 2, 3, 0.01
BUDGETS = (0.3, 0.5, 0.7)
FROZEN = ("sum", "weighted", "ramped", "distill", "distill-all", "ztw")
JOINT = ("sum", "distill", "distill-all")


def trained(name: str, seed: int, data: Any, out: Path) -> nn.Module:
    """The static network of a seed, or what an interrupted training left of it."""
    torch.manual_seed(seed)
    net, run = build(name, channels=data.train[0][0].shape[0]), out / "first"
    fit(
        net, cross_entropy, data.train, epochs=FIRST, lr=LR, optimizer=SGD, batch_size=BATCH, seed=seed,
        mixed_precision=AMP, run_dir=run, resume=run.exists(), progress=True,
    )  # fmt: skip
    return net.eval()


def measure(net: nn.Module, recipe: str, joint: bool, data: Any, seed: int) -> dict[str, Any]:
    """One recipe on one network."""
    dynamic = dc.convert(
        net, exits=EXITS, data=data, recipe=recipe, epochs=EPOCHS, freeze_trunk=not joint, trunk_lr=TRUNK_LR, seed=seed,
        mixed_precision=AMP, device="cpu", head="cascade" if recipe == "ztw" else "auto",
    )  # fmt: skip
    tuning, test = (collect_cached(dynamic, part) for part in (data.calibration, data.test))
    policy, whole = dynamic.policy, dynamic.static_macs
    search = tuning.grid(policy)
    played = test.play(policy)
    ece = [exit["ece_after"] for exit in dynamic.trunk.meta["info"]["convert"]["exits"]]
    return {
        "exits": [round(right, 4) for right in test.right.mean(1).tolist()],
        "accuracy": round(played.accuracy, 4),
        "mean_macs": round(played.mean_macs / whole, 4),
        "shares": [round(share, 4) for share in played.shares],
        "at_budget": {str(b): _at(search, test, policy, b, whole) for b in BUDGETS},
        "largest_ece": round(max(ece), 4),
        "time_ratio": _times(net, dynamic, data),
    }


def _at(search: ThresholdSearch, test: Cached, policy: dc.ExitPolicy, budget: float, whole: float) -> dict[str, float]:
    """Accuracy and mean MACs on the test split within a budget that is met on the calibration split."""
    found = test.play(replace(policy, thresholds=search.for_macs(budget * whole).thresholds))
    return {"accuracy": round(found.accuracy, 4), "mean_macs": round(found.mean_macs / whole, 4)}


def _times(net: nn.Module, dynamic: dc.DynamicModel, data: Any) -> dict[str, float]:
    """Wall clock of `predict` over that of the captured static network, by batch size."""
    static = dc.capture(net, data.train[0][0][None].repeat(2, 1, 1, 1)).eval()
    inputs = latency_inputs(data.test, {1: 128, 16: 16, 256: 4})
    taken = measure_latency({"static": static, "dynamic": dynamic.predict}, inputs, 5)
    return {str(batch): round(ms / taken["static"][batch], 3) for batch, ms in taken["dynamic"].items()}


def main() -> None:
    """Measures what the results lack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion_mnist", choices=("fashion_mnist", "cifar10"))
    parser.add_argument("--net", default="resnet20-cifar")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/exits"))
    asked = start(parser)
    data, key = splits(asked.data), f"{asked.data} {asked.net}"
    setting = {"first": FIRST, "epochs": EPOCHS, "exits": EXITS, "trunk_lr": TRUNK_LR, "precision": AMP}
    found = read(RESULTS)
    check_setting(found, setting, RESULTS)
    nets = found.get("networks", {})
    recipes = [(recipe, recipe, False) for recipe in FROZEN] + [(f"{recipe}, joint", recipe, True) for recipe in JOINT]
    for seed in range(asked.seeds):
        rows = nets.setdefault(key, {}).setdefault(str(seed), {})
        missing = [row for row in recipes if row[0] not in rows]
        if not missing:
            continue
        net = trained(asked.net, seed, data, asked.out / f"{asked.data}-{asked.net}-{seed}")
        rows.setdefault("static", {"accuracy": round(dc.evaluate(net, data.test, batch_size=250).accuracy, 4)})
        for name, recipe, joint in missing:
            rows[name] = measure(net, recipe, joint, data, seed)
            print(key, seed, name, json.dumps(rows[name]), flush=True)
            write(RESULTS, {**header("exits.py"), "setting": setting, "networks": nets})


if __name__ == "__main__":
    main()
