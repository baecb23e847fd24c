"""Transformers whose attention and MLP branches are skipped: a BERT-style classifier on SST-2, a vision transformer.

    python benchmarks/gates_transformers.py [--macs 0.7] [--out FOLDER]      writes benchmarks/gates_transformers.json

Each trained network is gated by `dc.gate` (gumbel). Accuracy on the test split in float32, for the network as it was
and gated; MACs as counted while predicting; milliseconds per call, static and gated taking turns, and the speed-up over
what the MACs promise. The classifier is trained first, the vision transformer comes trained on digits. What is measured
is not measured again.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import AMP, check_setting, header, read, start, write
from data import splits
from torch import fx

import dyncompress as dc
from dyncompress.compress.evaluation.wall_clock import latency_inputs, measure_latency
from dyncompress.compress.training.losses import cross_entropy
from dyncompress.compress.training.trainer import fit
from dyncompress.model_zoo import build, load, load_data
from dyncompress.passes.graph.cost import count_macs

RESULTS = Path(__file__).with_suffix(".json")
FIRST, LR, BATCH = 5, 1e-3, 64  # as in bert_sparsity.py
EPOCHS, GATE_LR, TRUNK_LR = 4, 5e-3, 0.1
CALLS = {1: 100, 64: 6}


def classifier(out: Path, seed: int = 0) -> tuple[fx.GraphModule, Any]:
    """A BERT-style classifier trained on SST-2, and its data."""
    data, run = splits("sst2"), out / f"first-{seed}"
    torch.manual_seed(seed)
    net = build("text-encoder", vocabulary=len(data.vocabulary), classes=data.classes)
    gm = dc.capture(net, data.train[0][0][None].repeat(2, 1))
    fit(
        gm, cross_entropy, data.train, epochs=FIRST, lr=LR, batch_size=BATCH, seed=seed, mixed_precision=AMP,
        run_dir=run, resume=run.exists(),
    )  # fmt: skip
    return gm.eval(), data


def vision(out: Path) -> tuple[fx.GraphModule, Any]:
    """The vision transformer of the zoo and the digits it was trained on."""
    data = load_data("digits")
    return dc.capture(load("vit-digits").eval(), data.train[0][0][None]), data


MODELS = {"text-encoder sst2": classifier, "vit-digits": vision}


def row(static: fx.GraphModule, data: Any, name: str, macs: float, out: Path) -> dict[str, Any]:
    """The network before and after."""
    run, whole = out / f"gated-{name.split()[0]}", count_macs(static)
    gated = dc.gate(
        static, data=data, macs=macs, epochs=EPOCHS, lr=GATE_LR, trunk_lr=TRUNK_LR, batch_size=BATCH,
        mixed_precision=AMP, run_dir=run, resume=run.exists(),
    )  # fmt: skip
    found = dc.evaluate(gated, data.test)
    assert found.mean_macs is not None
    left = found.mean_macs / whole
    ms = measure_latency({"static": static, "gated": gated.predict}, latency_inputs(data.test, CALLS))
    report = gated.trunk.meta["info"]["gate"]
    return {
        "static_accuracy": round(dc.evaluate(static, data.test).accuracy, 4),
        "accuracy": round(found.accuracy, 4),
        "macs": round(left, 4),
        "branches": report["branches"],
        "open": [round(rate, 3) for rate in report["open"]],
        "settled": report["settled"],
        "by_hardness": [round(sum(rates) / len(rates), 3) for rates in report["by_hardness"]],
        "ms": {str(size): [round(ms[side][size], 3) for side in ms] for size in CALLS},
        "realised": {str(size): round(ms["static"][size] / ms["gated"][size] * left, 3) for size in CALLS},
    }


def main() -> None:
    """Gates, measures, writes after every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.7)
    parser.add_argument("--out", type=Path, default=Path("runs/gates_transformers"))
    asked = start(parser)
    setting = {
        "epochs": [FIRST, EPOCHS], "lr": [LR, GATE_LR], "trunk_lr": TRUNK_LR, "batch": BATCH, "precision": AMP,
        "macs": asked.macs,
    }  # fmt: skip
    command = f"gates_transformers.py --macs {asked.macs}"
    result = read(RESULTS) or {**header(command), "setting": setting, "networks": {}}
    check_setting(result, setting, RESULTS)
    for name, make in MODELS.items():
        if name not in result["networks"]:
            result["networks"][name] = row(*make(asked.out), name, asked.macs, asked.out)
            write(RESULTS, result)
        print(name, result["networks"][name], flush=True)


if __name__ == "__main__":
    main()
