"""What the benchmarks share: their results on disk, how residual networks are trained, and PyTorch's count of MACs."""

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data import available
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

AMP = "bf16" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else None

# a residual network's first training
FIRST, LR, BATCH = 6, 0.1, 128
SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4, nesterov=True)

_STEPS = 256  # of pruning ratios


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of a benchmark on one thread. Raises SystemExit where its data sets are not there."""
    asked = parser.parse_args()
    if not available():
        raise SystemExit("the data sets of benchmarks are not there")
    torch.set_num_threads(1)
    return asked


# --- results -----------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """What was measured so far."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def check_setting(found: dict[str, Any], setting: dict[str, Any], path: Path) -> None:
    """Raises SystemExit for results in a file that were measured with another setting."""
    if found.get("setting", setting) != setting:
        raise SystemExit(f"{path.name} holds results of another setting; move it away first")


def write(path: Path, result: dict[str, Any]) -> None:
    """Beside its place first, then renamed: an interrupted run leaves the old file."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, path)


def header(command: str) -> dict[str, Any]:
    """How to repeat the measurement."""
    return {"command": f"python benchmarks/{command}", "threads": 1, "torch": torch.__version__}


# --- multiply-adds -----------------------------------------------------------------------------------------------


@torch.no_grad()
def macs_of(model: nn.Module, example: Tensor) -> int:
    """Multiply-adds of one image by PyTorch's counter (two operations each)."""
    counter = FlopCounterMode(display=False)
    with counter:
        model.eval()(example)
    return counter.get_total_flops() // 2


def largest_within(macs: float, example: Tensor, prune: Callable[[float], nn.Module]) -> nn.Module:
    """The largest of the networks within `macs` that `prune` makes, over pruning ratios in steps of 1/256."""
    best, low, high = None, 0, _STEPS
    while low < high:
        middle = (low + high) // 2
        small = prune(middle / _STEPS)
        if macs_of(small, example) <= macs:
            best, high = small, middle
        else:
            low = middle + 1
    assert best is not None
    return best
