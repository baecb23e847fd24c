"""`prune --stream`: a checkpoint larger than memory, ranked and shrunk piece by piece."""

import json
from collections import Counter
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import fx

from ...compress.evaluation.report_entries import StaticEntry
from ...compress.evaluation.reports import to_json
from ...compress.options.flat import options_of, values_of
from ...compress.options.limits import Limits
from ...compress.options.steps import Prune
from ...compress.options.training_options import Run
from ...compress.pruning.prune_checkpoint import KEPT, prune_checkpoint
from ...errors import RequestError
from ...passes.axes.axes import infer_axes
from ...passes.capture.capture_empty import build_empty, capture_on_meta
from ...passes.graph.cost import count_bytes, count_macs, count_parameters
from ...passes.shrink.shrink import shrink
from ...runtime.files.shards import DTYPES, Source
from ..loading.models import architecture, example_for
from ..report import tables
from .folders import Interrupted, finish
from .options import DataOptions, ModelOptions, StreamOptions

_TARGETS = ("ratio", "macs", "params", "bytes")
_TAKEN = (*_TARGETS, *(field.name for field in fields(Limits)), "scope", "exact")


@dataclass(frozen=True)
class AxisChange:
    """An axis that lost indices, and how many it has."""

    name: str
    kind: str
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class StreamReport:
    """The result, the model before and after, and the axes that lost indices."""

    model: str
    run_dir: str
    static: StaticEntry
    pruned: StaticEntry
    axes: tuple[AxisChange, ...]


def check_request(step: Prune, source: ModelOptions, data: DataOptions, stream: StreamOptions) -> None:
    """Raises RequestError for options that do not go together, or need the weights in memory."""
    if not stream.stream:
        raise RequestError("--drop goes with --stream")
    if source.arch is None:
        raise RequestError("--stream needs --arch: hf:DIR_OR_CONFIG, timm:NAME or package.module:factory, for example")
    for option in ("data", "device"):
        if getattr(data, option) is not None:
            raise RequestError(f"--stream reads and writes files on the CPU, without data: leave --{option} out")
    for name, value in values_of(step).items():
        if name not in _TAKEN and value != options_of(Prune)[name].default:
            raise RequestError(f"--stream does not go with --{name.replace('_', '-')}: it ranks by l2, at once")


def prune_streamed(
    model: str,
    step: Prune,
    source: ModelOptions,
    stream: StreamOptions,
    folder: Path,
    *,
    resume: bool,
    overwrite: bool,
    console: Console,
) -> dict[str, Any]:
    """Prunes the safetensors in MODEL into `folder`, prints what changed and returns the report that it leaves there.

    Raises:
        RequestError, DynCompressError: as `prune_checkpoint`. Interrupted: Ctrl-C; `folder` resumes.
    """
    stored = Source(Path(model))
    gm = _captured(source, stored)
    targets = {name: getattr(step, name) for name in _TARGETS}
    try:
        prune_checkpoint(
            gm, stored.path, folder, **targets, drop=stream.drop, overwrite=overwrite,
            limits=step.limits, cuts=step.cuts, run=Run(resume=resume),
        )  # fmt: skip
    except KeyboardInterrupt:
        raise Interrupted(folder) from None
    report = _report(gm, folder, step.cuts.exact)
    show(report, console)
    plain = {**to_json(report), "onnx": None, "data": None, "device": "cpu"}
    finish(folder, plain, partial(show, report))
    return plain


def _captured(source: ModelOptions, stored: Source) -> fx.GraphModule:
    """The architecture without its parameters, in the dtype of most bytes of the source."""
    arch, found = str(source.arch), []
    counts = Counter[torch.dtype]()
    for tensor in stored.tensors.values():
        counts[DTYPES[tensor.dtype]] += tensor.nbytes
    floating = [dtype for dtype, _ in counts.most_common() if dtype.is_floating_point]
    if not floating:
        raise RequestError(f"{stored.path} holds no floating-point tensors")

    def build() -> torch.nn.Module:
        found.append(architecture(arch, weights=False))
        return found[0].module.eval()

    module = build_empty(build, floating[0])
    return capture_on_meta(module, example_for(arch, found[0], source.shape), floating[0])


def _report(gm: fx.GraphModule, folder: Path, exact: bool) -> StreamReport:
    keep = json.loads((folder / KEPT).read_text(encoding="utf-8"))["keep"]
    changed = (AxisChange(a.name, a.kind, a.size, len(keep[a.name])) for a in infer_axes(gm) if a.name in keep)
    small = shrink(gm, keep, exact=exact)
    return StreamReport(
        model=str(folder), run_dir=str(folder), static=_entry(gm), pruned=_entry(small), axes=tuple(changed)
    )


def _entry(gm: fx.GraphModule) -> StaticEntry:
    """What needs the weights in memory is not measured."""
    costs = {"macs": count_macs(gm), "parameters": count_parameters(gm), "bytes": count_bytes(gm)}
    return StaticEntry(accuracy=None, latency_ms={}, **costs)


def show(report: StreamReport, console: Console) -> None:
    """Prints a report as tables: the axes that lost most, and the models side by side."""
    lost = sorted(report.axes, key=lambda axis: axis.after / axis.before)
    cells = [(a.name, a.kind, a.before, a.after, tables.percent(a.after / a.before)) for a in lost]
    console.print(tables.rows("Axes, those that lost most first", ("axis", "kind", "before", "after", "kept"), cells))
    console.print(tables.comparison({"static": report.static, "pruned": report.pruned}, "MACs per sample"))
    console.print(f"model: {report.model}", soft_wrap=True, markup=False, highlight=False)
