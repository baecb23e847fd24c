"""Runs `dyncompress demo` and times its model with all exits off against the static one, side by side.

python benchmarks/demo.py [--threads 2] [--quick]      writes benchmarks/demo.json
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from common import QUICK, Benchmark
from data import splits

import dyncompress as dc
from dyncompress.compress.evaluation.wall_clock import latency_inputs, measure_latency
from dyncompress.model_zoo import zoo as models

BENCHMARK = Benchmark(
    __file__, __doc__,
    ours="{macs_ratio:.2f} of the MACs for {accuracy_lost:.2%} of accuracy in {demo_seconds:.0f} s; wall clock "
    "{wall_clock_ratio/1:.2f} at one sample, {wall_clock_ratio/256:.2f} at 256; with all exits off "
    "{exits_off_ratio/1:.2f} and {exits_off_ratio/256:.2f}",
)  # fmt: skip
NET = "lstm-digits" if QUICK else "vgg-digits"
STEPS = f"model: zoo:{NET}\ndata: digits\nsteps:\n  - convert: {{exits: 1, epochs: 1}}\n  - export\n"
ROUNDS, CALLS = (1, {1: 2}) if QUICK else (9, {1: 64, 256: 1})


def main() -> None:
    """Runs the demo in a process of its own, then measures its result."""
    parser = BENCHMARK.parser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    BENCHMARK.start(parser)
    with tempfile.TemporaryDirectory() as folder:
        command = ["demo"]
        if QUICK:  # its steps, with a smaller network
            command = ["run", f"{folder}/recipe.yaml"]
            Path(command[1]).write_text(STEPS)
        command = [sys.executable, "-m", "dyncompress", *command, "--json", "--out", f"{folder}/run"]
        begin = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - begin
        report = json.loads(done.stdout)
        dynamic = dc.load(report["model"])
        assert isinstance(dynamic, dc.DynamicModel)
        off = exits_off(dynamic)
    for key in ("model", "onnx", "run_dir"):
        report[key] = Path(report[key]).name
    ratios = {
        batch: round(report["dynamic"]["latency_ms"][batch] / ms, 3)
        for batch, ms in report["static"]["latency_ms"].items()
    }
    result = {
        "demo_seconds": round(seconds, 1),
        "macs_ratio": round(report["dynamic"]["mean_macs"] / report["static"]["macs"], 3),
        "accuracy_lost": round(report["static"]["accuracy"] - report["dynamic"]["accuracy"], 4),
        "wall_clock_ratio": ratios,
        "exits_off_ratio": off,
        "report": report,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "report"}, indent=1))
    BENCHMARK.write(result)


def exits_off(dynamic: dc.DynamicModel) -> dict[str, float]:
    """Wall clock of predict with every exit off over that of the static captured model, by batch size: the median of
    the ratios of nine rounds."""
    dynamic = dynamic.eval().with_policy(dc.ExitPolicy.never(len(dynamic.exits)))
    static = dc.capture(models.load(NET), models.example_input(NET)).eval()
    inputs = latency_inputs(splits("digits").test, CALLS)
    calls: dict[str, Callable[..., object]] = {"static": static, "off": dynamic.predict}
    rounds = [measure_latency(calls, inputs, 5) for _ in range(ROUNDS)]
    return {str(b): round(median(taken["off"][b] / taken["static"][b] for taken in rounds), 3) for b in inputs}


if __name__ == "__main__":
    main()
