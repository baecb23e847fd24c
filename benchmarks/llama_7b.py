"""Captures, types and halves a 7-billion-parameter Llama configuration on the meta device: seconds and peak memory.

python benchmarks/llama_7b.py      writes benchmarks/llama_7b.json
"""

import json
import resource
import sys
import time
import types
from pathlib import Path

import torch

import dyncompress as dc


def main() -> None:
    """Measures once, in this process."""
    # A CPU-only torch cannot load torchvision's compiled operators, which transformers imports where it is installed.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
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
    small = dc.shrink(gm, {axis.name: range(0, axis.size, 2) for axis in axes.prunable})
    shrunk = time.perf_counter()
    result = {
        "command": "python benchmarks/llama_7b.py",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in gm.parameters()),
        "capture_s": round(captured - begin, 2),
        "typing_s": round(typed - captured, 3),
        "shrink_s": round(shrunk - typed, 2),
        "axes": len(axes),
        "prunable": len(axes.prunable),
        "parameters_after_halving_every_axis": sum(p.numel() for p in small.parameters()),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }
    text = json.dumps(result, indent=1)
    print(text)
    Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
