"""Prunes a generated checkpoint of several GB to half from its files: seconds and peak memory, each in its own process.

python benchmarks/stream.py [FOLDER] [--quick]      writes benchmarks/stream.json; needs 8 GB of disk below FOLDER (by
                                                    default the temporary folder), which are free again at the end

The bound on the peak resident memory, Python and its libraries included, is the largest tensor x 3 + 1 GB.
"""

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import QUICK, Benchmark, without_compiled_operators
from safetensors import safe_open
from safetensors.torch import save_file
from torch import fx

import dyncompress as dc
from dyncompress.compress.pruning import prune_checkpoint as stream_prune

BENCHMARK = Benchmark(
    __file__, __doc__, needs=("transformers",), within="4.5 GB",
    ours="{bytes_before_gb:.1f} GB: {capture_s:.0f} s to capture, {rank_s:.0f} to rank, {choose_s:.0f} to choose, "
    "{write_s:.0f} to write, in {peak_memory_gb:.2f} GB of memory",
)  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000, "use_cache": False,
    },
    "1.4 GB": {
        "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 8, "num_attention_heads": 20,
        "num_key_value_heads": 5, "vocab_size": 32000, "use_cache": False,
    },
}  # fmt: skip
SIZES["4.5 GB"] = SIZES["1.4 GB"] | {"num_hidden_layers": 30}
STREAMED: tuple[str, ...] = ("1.4 GB", "4.5 GB")
SHARD_BYTES = 10**9
if QUICK:
    SIZES["quick"] = SIZES["1.4 GB"] | {"hidden_size": 320, "intermediate_size": 640, "num_hidden_layers": 3}
    SIZES["7B"], STREAMED, SHARD_BYTES = SIZES["quick"], ("quick",), 10**7
PARAMS = 0.5


def main() -> None:
    """Runs every measurement in a process of its own. A child inherits its parent's peak, which is that of imports."""
    parser = BENCHMARK.parser()
    parser.add_argument("folder", nargs="?", help="of the checkpoints")
    asked = BENCHMARK.start(parser)
    result: dict[str, Any] = {
        "cores": os.cpu_count(),
        "load_average_before": round(os.getloadavg()[0], 1),  # of other work: it stretches the seconds
        "plan_7b": child("plan"),
    }
    for size in STREAMED:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            made = child("make", size, folder)
            pruned = child("prune", size, folder)
            pruned["bound_gb"] = round(3 * made["largest_tensor_gb"] + 1, 3)
            pruned["within_bound"] = pruned["peak_memory_gb"] <= pruned["bound_gb"]
            result[size] = made | pruned | child("check", size, folder)
    print(json.dumps(result, indent=1))
    BENCHMARK.write(result)


def child(*words: str) -> dict[str, Any]:
    """What a step, run in its own process, prints."""
    command = [sys.executable, __file__, "--step", *words, *(["--quick"] if QUICK else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def peak_gb() -> float:
    """Peak resident memory of this process, file pages included."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


def capture(size: str, dtype: torch.dtype) -> fx.GraphModule:
    """The captured model of a size, without memory for its parameters."""
    import transformers

    config = transformers.LlamaConfig(**SIZES[size])
    tokens = {"input_ids": torch.zeros(2, 16, dtype=torch.int64)}
    return dc.capture_empty(lambda: transformers.LlamaForCausalLM(config).eval(), tokens, dtype=dtype)


def plan() -> dict[str, Any]:
    """A plan that halves every axis of the 7-billion-parameter configuration."""
    import transformers

    _ = transformers.LlamaForCausalLM  # imported on first use
    imported, cpu, memory = time.perf_counter(), time.process_time(), peak_gb()
    gm = capture("7B", torch.bfloat16)
    captured = time.perf_counter()
    keep = {axis.name: range(0, axis.size, 2) for axis in dc.infer_axes(gm).prunable if axis.size > 1}
    found = dc.plan(gm, {name: list(kept) for name, kept in keep.items()})
    planned = time.perf_counter()
    return {
        "parameters": sum(p.numel() for p in gm.parameters()),
        "tensors_sliced": len(found.kept),
        "build_and_capture_s": round(captured - imported, 2),
        "plan_s": round(planned - captured, 2),
        "all_cpu_s": round(time.process_time() - cpu, 2),
        "memory_after_imports_gb": memory,
        "peak_memory_gb": peak_gb(),
    }


def make(size: str, folder: str) -> dict[str, Any]:
    """A checkpoint of random numbers in shards of 1 GB, one shard at a time."""
    gm, source = capture(size, torch.bfloat16), Path(folder, "source")
    source.mkdir()
    tensors = dict(gm.named_parameters())
    shards: list[dict[str, Any]] = [{}]
    where = {}
    for number, (name, empty) in enumerate(tensors.items()):
        if sum(t.nbytes for t in shards[-1].values()) + empty.nbytes > SHARD_BYTES:
            save_file(shards[-1], source / file_of(len(shards)))
            shards[-1] = {}  # written: only its name stays
            shards.append({})
        generator = torch.Generator().manual_seed(number)
        # Every row and column has a size of its own, so that there is something to choose.
        rows = torch.rand(len(empty), generator=generator).reshape(-1, *[1] * (empty.dim() - 1))
        values = torch.empty(empty.shape).normal_(0, 0.02, generator=generator)
        shards[-1][name] = values.mul_(0.5 + rows).to(torch.bfloat16)
        where[name] = file_of(len(shards))
    save_file(shards[-1], source / file_of(len(shards)))
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return {
        "bytes_before_gb": round(sum(t.nbytes for t in tensors.values()) / 1e9, 3),
        "largest_tensor_gb": round(max(t.nbytes for t in tensors.values()) / 1e9, 3),
        "shards": len(shards),
    }


def file_of(number: int) -> str:
    """A plain name; the index says the rest."""
    return f"part-{number}.safetensors"


def prune(size: str, folder: str) -> dict[str, Any]:
    """Ranks and shrinks; what is measured."""
    begin, cpu = time.perf_counter(), time.process_time()
    gm = capture(size, torch.bfloat16)
    captured, memory = time.perf_counter(), peak_gb()
    marks = {}

    def marked(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            value = function(*args, **kwargs)
            marks[function.__name__] = time.perf_counter()
            return value

        return call

    for name in ("stream_l2_scores", "choose"):
        setattr(stream_prune, name, marked(getattr(stream_prune, name)))
    out = dc.prune_checkpoint(gm, Path(folder, "source"), Path(folder, "out"), params=PARAMS)
    end = time.perf_counter()
    return {
        "capture_s": round(captured - begin, 1),
        "rank_s": round(marks["stream_l2_scores"] - captured, 1),
        "choose_s": round(marks["choose"] - marks["stream_l2_scores"], 1),
        "write_s": round(end - marks["choose"], 1),
        "all_cpu_s": round(time.process_time() - cpu, 1),
        "bytes_after_gb": round(sum(p.stat().st_size for p in out.iterdir()) / 1e9, 3),
        "memory_before_streaming_gb": memory,
        "peak_memory_gb": peak_gb(),
    }


def check(size: str, folder: str) -> dict[str, Any]:
    """Compares tensors of the result with the same slices taken by plain indexing."""
    keep = json.loads(Path(folder, "out", "kept.json").read_text())["keep"]
    kept = {name: torch.tensor(indices) for name, indices in keep.items()}

    def tensor(side: str, name: str) -> Any:
        index = json.loads(Path(folder, side, "model.safetensors.index.json").read_text())["weight_map"]
        with safe_open(Path(folder, side, index[name]), framework="pt") as file:
            return file.get_tensor(name)

    last = SIZES[size]["num_hidden_layers"] - 1
    width = next(
        (kept[name] for name in kept if name.endswith(("layers.0.input_layernorm.weight:0", "embed_tokens.weight:1"))),
        torch.arange(SIZES[size]["hidden_size"]),
    )
    checked = 0
    for layer in (0, last // 2, last):
        path = f"model.layers.{layer}.mlp"
        units = kept[f"{path}.gate_proj.weight:0"]
        for name, rows, columns in (
            (f"{path}.gate_proj.weight", units, width),
            (f"{path}.up_proj.weight", units, width),
            (f"{path}.down_proj.weight", width, units),
        ):
            assert torch.equal(tensor("out", name), tensor("source", name)[rows][:, columns]), name
            checked += 1
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(tensor("out", name), tensor("source", name)[:, width]), name
        checked += 1
    left = [sum(math.prod(shape) for shape in shapes(Path(folder, side))) for side in ("out", "source")]
    return {"tensors_checked": checked, "parameters_left": round(left[0] / left[1], 4)}


def shapes(folder: Path) -> list[list[int]]:
    """The shape of every tensor in a folder."""
    found = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found += [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        torch.set_num_threads(1)
        without_compiled_operators()
        steps: dict[str, Callable[..., dict[str, Any]]] = {"plan": plan, "make": make, "prune": prune, "check": check}
        print(json.dumps(steps[sys.argv[2]](*[word for word in sys.argv[3:] if word != "--quick"])))
    else:
        main()
