"""Captures, types and halves every model of the list, and holds each to the masked oracle.

    python benchmarks/coverage.py [SOURCE:NAME ...]      writes benchmarks/coverage.json

A model passes when half of every prunable axis can be removed and the smaller model returns the right shapes.
`oracle` is the largest difference between the masked and the shrunk model (exact mode), relative to `effect`, what the
mask changes in the output, in float64.
"""

import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from model_list import MODELS, build
from torch import Tensor
from torch.utils import _pytree as pytree

from dyncompress import RequestError
from dyncompress.passes.axes import infer_axes
from dyncompress.passes.capture import capture, split_inputs
from dyncompress.passes.cost import count_macs
from dyncompress.passes.shrink import mask, shrink


def measure(name: str) -> dict[str, Any]:
    """One row of the table."""
    model, inputs = build(name)
    begin = time.perf_counter()
    gm = capture(model, inputs)
    captured = time.perf_counter()
    axes = infer_axes(gm)
    typed = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    keep = {
        axis.name: torch.randperm(axis.size, generator=generator)[: (axis.size + 1) // 2].tolist()
        for axis in axes.prunable
    }
    small = shrink(gm, keep)
    shrunk = time.perf_counter()
    args, kwargs = split_inputs(inputs)
    with torch.no_grad():
        full, ours, half = model(*args, **kwargs), gm(*args, **kwargs), small(*args, **kwargs)
    same_shapes = [a.shape for a in _tensors(full)] == [a.shape for a in _tensors(half)]
    return {
        "model": name,
        "ok": same_shapes,
        "capture_s": round(captured - begin, 3),
        "typing_s": round(typed - captured, 4),
        "shrink_s": round(shrunk - typed, 3),
        "capture_error": _gap(full, ours),
        "prunable": len(axes.prunable),
        "axes": len(axes),
        "parameters_left": round(_count(small) / _count(gm), 3),
        "macs_left": round(count_macs(small) / count_macs(gm), 3),
        "untyped": sorted(set(axes.untyped.values())),
        **_oracle(gm, keep, args, kwargs),
    }


def _oracle(gm: Any, keep: dict[str, list[int]], args: Any, kwargs: Any) -> dict[str, Any]:
    """In float64, on one sample; in float32 where the model writes float32 into its own code."""
    with torch.no_grad():  # statistics of real activations: with the initial ones a deep random network is all zero
        gm.train()(*args, **kwargs)
    args, kwargs = pytree.tree_map(lambda x: x[:1] if isinstance(x, Tensor) else x, (args, kwargs))
    try:
        doubled = pytree.tree_map(_double, (args, kwargs))
        return {**_masked_gap(gm.eval().double(), keep, *doubled), "in": "float64"}
    except RequestError as error:
        return {"oracle": None, "oracle_reason": str(error)}
    except RuntimeError as error:
        if "double" not in str(error):
            raise
        return {**_masked_gap(gm.float(), keep, args, kwargs), "in": "float32"}


def _masked_gap(gm: Any, keep: dict[str, list[int]], args: Any, kwargs: Any) -> dict[str, float]:
    with torch.no_grad():
        full = gm(*args, **kwargs)
        masked, small = mask(gm, keep)(*args, **kwargs), shrink(gm, keep, exact=True)(*args, **kwargs)
    effect = _gap(full, masked)
    return {"oracle": _gap(masked, small) / effect, "effect": effect}


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _tensors(output: Any) -> Iterator[Tensor]:
    return (t for t in pytree.tree_leaves(output) if isinstance(t, Tensor))


def _gap(a: Any, b: Any) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(_tensors(a), _tensors(b), strict=True))


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    """Measures the models named on the command line, or all those of the list that the results lack."""
    results = Path(__file__).with_suffix(".json")
    rows = [] if sys.argv[1:] or not results.exists() else json.loads(results.read_text())["models"]
    done = {row["model"] for row in rows}
    for name in [m for m in sys.argv[1:] or MODELS if m not in done]:
        try:
            row = measure(name)
        except Exception as error:
            row = {"model": name, "ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
            if sys.argv[1:]:
                traceback.print_exc()
        rows.append(row)
        print(json.dumps(row), flush=True)
        if not sys.argv[1:]:
            result = {"command": "python benchmarks/coverage.py", "torch": torch.__version__, "models": rows}
            results.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{sum(r['ok'] for r in rows)} of {len(rows)} models pass", flush=True)


if __name__ == "__main__":
    main()
