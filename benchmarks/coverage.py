"""Captures, types and halves every model of the list, holds each to the masked oracle and puts the result to use.

    python benchmarks/coverage.py [SOURCE:NAME ...] [--quick]      writes benchmarks/coverage.json

A model passes when half of every prunable axis (branches aside) can be removed and the smaller model returns the
right shapes, trains a step, comes back from its file the same, and runs as ONNX; `failed` names what does not work.
`oracle` is the largest difference between the masked and the shrunk model (exact mode), relative to `effect`, what the
mask changes in the output. `branches` is the same for the removal of every other residual branch.
"""

import json
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from common import Benchmark
from model_list import MODELS, NEEDS, build, gap, tensors
from torch import Tensor
from torch.utils import _pytree as pytree

import dyncompress as dc
from dyncompress.passes.axes.axes import Axes
from dyncompress.passes.graph.cost import count_macs, count_parameters
from dyncompress.passes.graph.inputs import split_inputs
from dyncompress.passes.graph.nodes import attribute

BENCHMARK = Benchmark(
    __file__, __doc__, needs=NEEDS, ours="{passed} of {of} models pass",
)  # fmt: skip


def measure(name: str) -> dict[str, Any]:
    """One row of the table."""
    model, inputs = build(name)
    begin = time.perf_counter()
    gm = dc.capture(model, inputs)
    captured = time.perf_counter()
    axes = dc.infer_axes(gm)
    typed = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    keep = {
        axis.name: torch.randperm(axis.size, generator=generator)[: (axis.size + 1) // 2].tolist()
        for axis in axes.prunable
        if axis.kind != "branch"
    }
    small = dc.shrink(gm, keep)
    shrunk = time.perf_counter()
    args, kwargs = split_inputs(inputs)
    with torch.no_grad():
        full, ours = model(*args, **kwargs), gm(*args, **kwargs)
    failed = _failures(small, full, args, kwargs)
    return {
        "model": name,
        "ok": not failed,
        **({"failed": failed} if failed else {}),
        "capture_s": round(captured - begin, 3),
        "typing_s": round(typed - captured, 4),
        "shrink_s": round(shrunk - typed, 3),
        "capture_error": gap(full, ours),
        "prunable": dict(Counter(axis.kind for axis in axes.prunable)),
        "prunable_share": round(_prunable_share(gm, axes), 3),
        "frozen": dict(Counter(axis.reason for axis in axes if _is_learned(gm, axis) and not axis.prunable)),
        "parameters_left": round(count_parameters(small) / count_parameters(gm), 3),
        "macs_left": round(count_macs(small) / count_macs(gm), 3),
        "untyped": sorted(set(axes.untyped.values())),
        **_oracle(gm, keep, args, kwargs),
    }


def _failures(small: Any, full: Any, args: Any, kwargs: Any) -> dict[str, str]:
    """What the smaller model cannot do, with the reason."""

    def forward() -> None:
        with torch.no_grad():
            half = small(*args, **kwargs)
        assert [a.shape for a in tensors(full)] == [a.shape for a in tensors(half)], "the output has another shape"

    def backward() -> None:
        torch.stack([x.sum() for x in tensors(small(*args, **kwargs)) if x.is_floating_point()]).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in small.parameters()), "a gradient is not finite"
        assert any(p.grad is not None for p in small.parameters()), "no parameter has a gradient"

    def save_and_load() -> None:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            dc.save(small, f"{folder}/model.dyn.safetensors")
            again = dc.load(f"{folder}/model.dyn.safetensors")
            assert gap(small(*args, **kwargs), again(*args, **kwargs)) == 0, "the loaded model computes something else"

    def onnx() -> None:
        with tempfile.TemporaryDirectory() as folder:
            dc.export_onnx(small, f"{folder}/model.onnx")

    failed = {}
    for job in (forward, backward, save_and_load, onnx):
        error = _error_of(job)
        if error:
            failed[job.__name__] = error
    return failed


def _error_of(job: Callable[[], None]) -> str:
    try:
        job()
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def _is_learned(gm: Any, axis: dc.Axis) -> bool:
    return any(isinstance(attribute(gm, piece.tensor), torch.nn.Parameter) for piece in axis.slices)


def _prunable_share(gm: Any, axes: Axes) -> float:
    """The share of the parameters that some prunable axis (no branch) runs through."""
    names = {piece.tensor for axis in axes.prunable if axis.kind != "branch" for piece in axis.slices}
    return sum(p.numel() for n, p in gm.named_parameters() if n in names) / count_parameters(gm)


def _oracle(gm: Any, keep: dict[str, list[int]], args: Any, kwargs: Any) -> dict[str, Any]:
    """On one sample, in float32 and float64."""
    with torch.no_grad():  # statistics of real activations: with the initial ones a deep random network is all zero
        gm.train()(*args, **kwargs)
    args, kwargs = pytree.tree_map(lambda x: x[:1] if isinstance(x, Tensor) else x, (args, kwargs))
    branches = [axis.name for axis in dc.infer_axes(gm) if axis.kind == "branch"][::2]
    found: dict[str, Any] = {"oracle_float32": _masked_gap(gm.eval(), keep, args, kwargs)}
    args, kwargs = pytree.tree_map(_double, (args, kwargs))
    found["oracle"] = _masked_gap(_in_float64(gm), keep, args, kwargs)
    if branches:
        found["branches"] = _masked_gap(gm, {name: [] for name in branches}, args, kwargs)
    return found


def _in_float64(gm: Any) -> Any:
    """Its tensors, and its code where that names float32, as norms of language models do."""
    for node in gm.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(
            lambda value: torch.float64 if value is torch.float32 else value, (node.args, node.kwargs)
        )
    gm.recompile()
    return gm.double()


def _masked_gap(gm: Any, keep: dict[str, list[int]], args: Any, kwargs: Any) -> float:
    """The largest difference of masked and shrunk over what the mask changes."""
    with torch.no_grad():
        full = gm(*args, **kwargs)
        masked, small = dc.mask(gm, keep)(*args, **kwargs), dc.shrink(gm, keep, exact=True)(*args, **kwargs)
    return gap(masked, small) / max(gap(full, masked), 1e-30)


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def main() -> None:
    """Measures the models named on the command line, or all those of the list that the results lack."""
    parser = BENCHMARK.parser()
    parser.add_argument("models", nargs="*", help="SOURCE:NAME, measured without a trace; default: all of models.txt")
    named = BENCHMARK.start(parser).models
    rows = [] if named else BENCHMARK.read().get("models", [])
    done = {row["model"] for row in rows}
    for name in [m for m in named or MODELS if m not in done]:
        try:
            row = measure(name)
        except Exception as error:
            row = {"model": name, "ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
            traceback.print_exc()
        rows.append(row)
        print(json.dumps(row), flush=True)
        if not named:
            BENCHMARK.write({"passed": sum(row["ok"] for row in rows), "of": len(rows), "models": rows})
    print(f"{sum(r['ok'] for r in rows)} of {len(rows)} models pass", flush=True)


if __name__ == "__main__":
    main()
