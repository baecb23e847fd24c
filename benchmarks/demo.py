"""Runs `dyncompress demo` and times its model with all exits off against the static one, side by side.

python benchmarks/demo.py [--threads 2]      writes benchmarks/demo.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import dyncompress as dc
from dyncompress.compress.evaluation.wall_clock import latency_inputs, measure_latency
from dyncompress.model_zoo import zoo as models


def main() -> None:
    """Runs the demo in a process of its own, then measures its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        command = [sys.executable, "-m", "dyncompress", "demo", "--json", "--out", f"{folder}/run"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - begin
        report = json.loads(done.stdout)
        off = exits_off(dc.load(report["model"]))
    for key in ("model", "onnx", "run_dir"):
        report[key] = Path(report[key]).name
    ratios = {
        batch: round(report["dynamic"]["latency_ms"][batch] / ms, 3)
        for batch, ms in report["static"]["latency_ms"].items()
    }
    result: dict[str, Any] = {
        "command": "python benchmarks/demo.py",
        "machine": f"{torch.get_num_threads()} threads, CPU, torch {torch.__version__}",
        "demo_seconds": round(seconds, 1),
        "macs_ratio": round(report["dynamic"]["mean_macs"] / report["static"]["macs"], 3),
        "accuracy_lost": round(report["static"]["accuracy"] - report["dynamic"]["accuracy"], 4),
        "wall_clock_ratio": ratios,
        "exits_off_ratio": off,
        "report": report,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "report"}, indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


def exits_off(dynamic: dc.DynamicModel) -> dict[str, float]:
    """Wall clock of predict with every exit off over that of the static captured model, by batch size: the median of
    the ratios of nine rounds."""
    dynamic = dynamic.eval().with_policy(dc.ExitPolicy.never(len(dynamic.exits)))
    static = dc.capture(models.load("vgg-digits"), models.example_input("vgg-digits")).eval()
    inputs = latency_inputs(dc.load_data("digits").test, {1: 64, 256: 1}, torch.device("cpu"))
    calls = {"static": static, "off": dynamic.predict}
    rounds = [measure_latency(calls, inputs, 5) for _ in range(9)]
    return {str(b): round(median(taken["off"][b] / taken["static"][b] for taken in rounds), 3) for b in inputs}


if __name__ == "__main__":
    main()
