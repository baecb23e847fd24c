"""Deadlines: how many calls of `predict(deadline_ms=...)` end in time, and how right their answers are.

    python benchmarks/deadline.py [--names vgg-digits resnet-digits] [--quick]            writes deadline.json

Three exits on the digits networks, and no thresholds: only the deadline lets samples leave. Deadlines are shares of the
time of a call that nothing cuts short, and take turns. `in_time`: the share of the calls that end by the deadline;
`within_a_stage`: by the deadline and the slowest stage with its head, as timed in the same process; `late_99`: how late
the latest but one in a hundred calls ends, in milliseconds. One thread.
"""

import time
from statistics import median
from typing import Any

import torch
from common import QUICK, Benchmark
from data import splits

import dyncompress as dc
from dyncompress.compress.evaluation.wall_clock import latency_inputs
from dyncompress.compress.thresholds.call_costs import time_costs
from dyncompress.compress.training.batches import size_of
from dyncompress.model_zoo import Splits, load

BENCHMARK = Benchmark(
    __file__, __doc__, within="networks/vgg-digits/1/deadlines/0.6",
    ours="VGG at .6 of the full time, sample by sample: {in_time:.1%} in time, {within_a_stage:.1%} within a stage, "
    "accuracy {accuracy:.1%}",
)  # fmt: skip
NAMES = ("resnet-digits",) if QUICK else ("vgg-digits", "resnet-digits")
CALLS = {1: 20} if QUICK else {1: 1000, 16: 400}  # batch size -> how many
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.5)
EXITS, EPOCHS, FOREVER = 3, 1 if QUICK else 4, 1e6


def timed(model: dc.DynamicModel, inputs: Any, deadline_ms: float) -> tuple[float, Any]:
    """Milliseconds of a call, and its answer."""
    begin = time.perf_counter()
    answer = model.predict(inputs, deadline_ms=deadline_ms)
    return 1e3 * (time.perf_counter() - begin), answer


def measure(model: dc.DynamicModel, data: Splits, batch: int, calls: int) -> dict[str, Any]:
    """Every deadline at one batch size."""
    inputs = latency_inputs(data.test, {batch: calls})[batch]
    count = size_of(data.test, "test")
    labels = [torch.tensor([data.test[(i * batch + j) % count][1] for j in range(batch)]) for i in range(calls)]
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
    parser = BENCHMARK.parser()
    parser.add_argument("--names", nargs="+", default=NAMES)
    asked = BENCHMARK.start(parser)
    data, found = splits("digits"), {}
    for name in asked.names:
        made = dc.convert(
            load(name), exits=EXITS, data=data, training=dc.Training(epochs=EPOCHS), run=dc.Run(device="cpu")
        )
        model = made.with_policy(dc.ExitPolicy.never(EXITS))
        found[name] = {str(batch): measure(model, data, batch, calls) for batch, calls in CALLS.items()}
        print(name, found[name], flush=True)
    BENCHMARK.write({"networks": found})


if __name__ == "__main__":
    main()
