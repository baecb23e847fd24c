"""Deadlines: how many calls of `predict(deadline_ms=...)` end in time, and how right their answers are.

    python benchmarks/deadline.py [--names vgg-digits resnet-digits]                      writes deadline.json

Three exits on the digits networks, and no thresholds: only the deadline lets samples leave. Deadlines are shares of the
time of a call that nothing cuts short, and take turns. `in_time`: the share of the calls that end by the deadline;
`within_a_stage`: by the deadline and the slowest stage with its head, as timed in the same process; `late_99`: how late
the latest but one in a hundred calls ends, in milliseconds. One thread.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import header, write

import dyncompress as dc
from dyncompress.compress.evaluation.wall_clock import latency_inputs
from dyncompress.compress.thresholds.call_costs import time_costs
from dyncompress.model_zoo import Splits, load, load_data

RESULTS = Path(__file__).with_suffix(".json")
CALLS = {1: 1000, 16: 400}  # batch size -> how many
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.5)
EXITS, EPOCHS, FOREVER = 3, 4, 1e6


def timed(model: dc.DynamicModel, inputs: Any, deadline_ms: float) -> tuple[float, Any]:
    """Milliseconds of a call, and its answer."""
    begin = time.perf_counter()
    answer = model.predict(inputs, deadline_ms=deadline_ms)
    return 1e3 * (time.perf_counter() - begin), answer


def measure(model: dc.DynamicModel, data: Splits, batch: int, calls: int) -> dict[str, Any]:
    """Every deadline at one batch size."""
    inputs = latency_inputs(data.test, {batch: calls})[batch]
    labels = [
        torch.tensor([data.test[(i * batch + j) % len(data.test)][1] for j in range(batch)]) for i in range(calls)
    ]
    for x in inputs[:20]:
        timed(model, x, FOREVER)
    whole = median(timed(model, x, FOREVER)[0] for x in inputs[:100])
    costs = time_costs(model, data.calibration, model.policy, batch=batch)
    stage = batch * max(s + h for s, h in zip(costs.stages, (*costs.heads, 0.0), strict=True))
    late: dict[float, list[float]] = {share: [] for share in SHARES}
    right, exits = dict.fromkeys(SHARES, 0.0), dict.fromkeys(SHARES, 0.0)
    for x, y in zip(inputs, labels, strict=True):
        for share in SHARES:
            ms, answer = timed(model, x, share * whole)
            late[share].append(ms - share * whole)
            right[share] += float((answer.logits.argmax(-1) == y).double().mean()) / calls
            exits[share] += float(answer.exit_index.double().mean()) / calls
    rows = {
        str(share): {
            "deadline_ms": round(share * whole, 2),
            "in_time": round(sum(ms <= 0 for ms in late[share]) / calls, 4),
            "within_a_stage": round(sum(ms <= stage for ms in late[share]) / calls, 4),
            "late_99": round(sorted(late[share])[int(0.99 * calls)], 2),
            "accuracy": round(right[share], 4),
            "mean_exit": round(exits[share], 2),
        }
        for share in SHARES
    }
    return {"whole_ms": round(whole, 2), "slowest_stage_ms": round(stage, 2), "calls": calls, "deadlines": rows}


def main() -> None:
    """Converts, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=("vgg-digits", "resnet-digits"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data, found = load_data("digits"), {}
    for name in asked.names:
        made = dc.convert(load(name), exits=EXITS, data=data, epochs=EPOCHS, device="cpu", progress=False)
        model = made.with_policy(dc.ExitPolicy.never(EXITS))
        found[name] = {str(batch): measure(model, data, batch, calls) for batch, calls in CALLS.items()}
        print(name, found[name], flush=True)
    write(RESULTS, {**header("deadline.py"), "networks": found})


if __name__ == "__main__":
    main()
