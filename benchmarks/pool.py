"""`predict_stream` against `predict` on small batches: vgg-digits, of whose samples half leave at each of three exits.

python benchmarks/pool.py [--samples 512] [--rounds 5] [--quick]      writes benchmarks/pool.json

Both answer the same batches in the same order, in turns; a ratio is the median over the rounds of predict's seconds
over those of the stream in the same round. The heads are not trained: thresholds are the medians of their scores.
"""

import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import QUICK, Benchmark
from data import splits
from torch import Tensor
from tqdm import tqdm

import dyncompress as dc
from dyncompress.model_zoo import zoo as models
from dyncompress.runtime.predict.policy import max_softmax

BENCHMARK = Benchmark(
    __file__, __doc__,
    ours="{by_batch/1/speed_up:.2f} times as fast one sample at a time, {by_batch/4/speed_up:.2f} by fours, "
    "{by_batch/16/speed_up:.2f} by sixteens, at {macs_ratio:.2f} of the MACs",
)  # fmt: skip
SAMPLES, ROUNDS, SIZES = (32, 1, (4,)) if QUICK else (512, 5, (1, 4, 16))


def main() -> None:
    """Measures every batch size and writes the figures."""
    parser = BENCHMARK.parser()
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = BENCHMARK.start(parser)
    data = splits("digits").test
    x = torch.stack([data[i][0] for i in range(options.samples)])
    dyn = half_leave(x)
    found = dyn.predict(x)
    result: dict[str, Any] = {
        "samples": options.samples,
        "rounds": options.rounds,
        "shares": [round(float((found.exit_index == k).double().mean()), 3) for k in range(len(dyn.exits) + 1)],
        "macs_ratio": round(float(found.macs.double().mean()) / dyn.static_macs, 3),
        "by_batch": {},
    }
    for size in tqdm(SIZES, desc="batch sizes"):
        result["by_batch"][size] = compare(dyn, x.split(size), options.rounds)
    print(json.dumps(result, indent=1))
    BENCHMARK.write(result, f"--samples {options.samples} --rounds {options.rounds}")


def half_leave(x: Tensor) -> dc.DynamicModel:
    """Half of the samples that reach an exit leave there."""
    torch.manual_seed(0)
    gm = dc.capture(models.load("vgg-digits"), models.example_input("vgg-digits"))
    dyn = dc.DynamicModel(dc.InsertExits(3)(gm).gm).eval()
    there, thresholds = torch.ones(len(x), dtype=torch.bool), []
    for z in dyn.all_logits(x)[:-1]:
        score = max_softmax(z)
        ranked = score[there].sort().values
        thresholds.append(float(ranked[len(ranked) // 2 - 1 :][:2].mean()))  # between two samples
        there &= score < thresholds[-1]
    return dyn.with_policy(dc.ExitPolicy("max-softmax", tuple(thresholds)))


def compare(dyn: dc.DynamicModel, batches: tuple[Tensor, ...], rounds: int) -> dict[str, float]:
    """Milliseconds per sample of both, and the ratio; `same_exit` is the share of samples with equal exits."""
    calls: dict[str, Callable[[], list[dc.Prediction]]] = {
        "predict": lambda: [dyn.predict(x) for x in batches],
        "stream": lambda: list(dyn.predict_stream(batches)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    exits = {}
    for _ in range(1 + rounds):
        for name, answer in calls.items():
            begin = time.perf_counter()
            answers = answer()
            seconds[name].append(time.perf_counter() - begin)
            exits[name] = torch.cat([found.exit_index for found in answers])
    per_sample = {f"{name}_ms": round(1e3 * min(s[1:]) / len(exits[name]), 3) for name, s in seconds.items()}
    ratio = median(p / s for p, s in zip(seconds["predict"][1:], seconds["stream"][1:], strict=True))
    same = float((exits["predict"] == exits["stream"]).double().mean())
    return {**per_sample, "speed_up": round(ratio, 3), "same_exit": round(same, 4)}


if __name__ == "__main__":
    main()
