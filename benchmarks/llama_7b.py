"""Captures, types and halves a 7-billion-parameter Llama configuration on the meta device: seconds and peak memory.

python benchmarks/llama_7b.py [--quick]      writes benchmarks/llama_7b.json
"""

import json
import resource
import time

import torch
from common import QUICK, Benchmark

import dyncompress as dc

BENCHMARK = Benchmark(
    __file__, __doc__, needs=("transformers",),
    ours="{parameters:,} parameters: {capture_s:.1f} s to capture, {typing_s:.2f} to type, {shrink_s:.1f} to shrink, "
    "{peak_memory_gb:.1f} GB",
)  # fmt: skip
LAYERS = 2 if QUICK else 32


def main() -> None:
    """Measures once, in this process."""
    BENCHMARK.start()
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=LAYERS, num_attention_heads=32, vocab_size=32000,
        use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    tokens = {"input_ids": torch.zeros(2, 16, dtype=torch.int64, device="meta")}
    begin = time.perf_counter()
    gm = dc.capture(model, tokens)
    captured = time.perf_counter()
    axes = dc.infer_axes(gm)
    typed = time.perf_counter()
    small = dc.shrink(gm, {axis.name: list(range(0, axis.size, 2)) for axis in axes.prunable})
    shrunk = time.perf_counter()
    result = {
        "parameters": sum(p.numel() for p in gm.parameters()),
        "capture_s": round(captured - begin, 2),
        "typing_s": round(typed - captured, 3),
        "shrink_s": round(shrunk - typed, 2),
        "axes": len(axes),
        "prunable": len(axes.prunable),
        "parameters_after_halving_every_axis": sum(p.numel() for p in small.parameters()),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }
    print(json.dumps(result, indent=1))
    BENCHMARK.write(result)


if __name__ == "__main__":
    main()
