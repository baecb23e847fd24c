"""How much of a cut in MACs becomes a cut in wall clock: halved models beside the full ones, batch 1 and 16.

    python benchmarks/speedup.py [MODEL ...] [--threads N] [--quick]      writes benchmarks/speedup.json

Every model is cut to about half of its MACs in these ways, and `realised` = speed-up / MACs reduction is measured:

    even       every axis loses the same share, whatever the width comes out as
    even x16   the same in multiples of 16 (8 where a model is narrow)
    latency    branches and widths chosen by measured latency, at the latency share that leaves half of the MACs

Weights are random: only shapes matter. Batch norms are folded on both sides. Full and cut models take turns; medians.
"""

import json
from typing import Any

import torch
from common import QUICK, Benchmark
from model_list import build
from torch import fx
from torch.utils import _pytree as pytree

import dyncompress as dc
from dyncompress.compress.evaluation.wall_clock import measure_latency
from dyncompress.passes.graph.cost import count_macs

BENCHMARK = Benchmark(
    __file__, __doc__, needs=("torchvision", "transformers"), within="rows/0",
    ours="ResNet-50 at half its MACs, one image a call: {even/latency:.2f} of the time cut evenly, "
    "{even x16/latency:.2f} in sixteens, {latency/latency:.2f} by latency",
)  # fmt: skip
MODELS = ("mobilenet_v2",) if QUICK else ("resnet50", "vgg16", "mobilenet_v2", "vit_b_16", "bert-base")
REPEATS = {1: 2} if QUICK else {1: 60, 16: 9}  # timed calls by batch size
_HALF = 0.03  # how far from half of the MACs is near enough
_TRIES = 1 if QUICK else 5


def captured(name: str) -> tuple[fx.GraphModule, Any]:
    """The model and one sample."""
    if name != "bert-base":
        model, x = build(f"torchvision:{name}")
        return dc.FoldBatchNorm()(dc.capture(model, x).eval()).gm, x[:1]
    import transformers as tr

    ids = {"input_ids": torch.randint(1000, 30000, (1, 128))}
    return dc.capture(tr.BertForSequenceClassification(tr.BertConfig()).eval(), ids).eval(), ids


def cuts(name: str, gm: fx.GraphModule, batch: int) -> dict[str, fx.GraphModule]:
    """The cut models by the way they were made."""
    multiple = 8 if name == "mobilenet_v2" else 16
    made = {
        "even": dc.prune(gm, macs=0.5, cuts=dc.Cuts(scope="axis")),
        f"even x{multiple}": dc.prune(gm, macs=0.5, cuts=dc.Cuts(scope="axis"), limits=dc.Limits(round_to=multiple)),
    }
    whole, low, high, share = count_macs(gm), 0.2, 0.9, 0.52
    for _ in range(_TRIES):
        small = dc.prune(
            gm,
            latency=share,
            cuts=dc.Cuts(latency_batch=batch),
            limits=dc.Limits(depth=True),
            run=dc.Run(progress=True),
        )
        left = count_macs(small) / whole
        made["latency"] = small
        if abs(left - 0.5) <= _HALF:
            break
        low, high = (share, high) if left < 0.5 else (low, share)
        share = min(max(share + 0.5 - left, low + 0.01), high - 0.01)
    return made


def measure(name: str, batch: int) -> dict[str, Any]:
    """One model at one batch size."""
    gm, inputs = captured(name)
    models = {"full": gm, **cuts(name, gm, batch)}
    many = pytree.tree_map(lambda x: x.repeat(batch, *[1] * (x.dim() - 1)), inputs)
    taken, whole = measure_latency(models, {batch: [many]}, REPEATS[batch]), count_macs(gm)
    ms = {way: by_batch[batch] for way, by_batch in taken.items()}
    found: dict[str, Any] = {"model": name, "batch": batch, "batch_norm": "folded"}
    found["full_ms"] = round(ms["full"], 2)
    for way in [way for way in models if way != "full"]:
        left, share = count_macs(models[way]) / whole, ms[way] / ms["full"]
        found[way] = {"macs": round(left, 3), "latency": round(share, 3), "realised": round(left / share, 3)}
    return found


def main() -> None:
    """Measures what is asked for and is not in the results yet."""
    parser = BENCHMARK.parser()
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = BENCHMARK.start(parser)
    rows = BENCHMARK.read().get("rows", [])
    for name, batch in [(name, batch) for batch in REPEATS for name in asked.models]:
        if any((r["model"], r["batch"]) == (name, batch) for r in rows):
            continue
        rows.append(measure(name, batch))
        print(json.dumps(rows[-1]), flush=True)
        BENCHMARK.write({"rows": rows}, f"--threads {asked.threads}")


if __name__ == "__main__":
    main()
