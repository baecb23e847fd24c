"""Segments joined into one ONNX graph in which samples leave early.

    stage 0 -> logits z, bool stay
    index = NonZero(stay)
    If(index is not empty)  then  Gather the rows `index` of what crosses -> stage 1 -> ... (nested likewise)
                                  ScatterND its logits and exit indices over those of stage 0
                            else  those of stage 0 as they are

Gated branches become Ifs of their own inside each stage (see `onnx_gates`).
Thresholds are constants, or inputs with a default that a caller may leave out.
The branch that is not taken is not computed, and in the one that is every operator sees the rows that stay.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import onnx_ir as ir

from .builder import ModelBuilder, Scope
from .gates import skip_branches
from .segments import GATES, THRESHOLD, Segment

_ANSWER = ("logits", "exit_index", "gates")  # without gates, two of them


def compose(inputs: Sequence[str], segments: list[Segment], exit_macs: Sequence[int], opset: int) -> ir.Model:
    """The dynamic model as one ONNX model.

    Args:
        inputs: the user's names of the first segment's inputs.
        segments: early first.
        exit_macs: MACs per sample of every exit, switched off or not, the end last.
        opset: of all the segments.

    Raises:
        RequestError: an input has the name of an output.
    """
    first = segments[0]
    given = {name: v for name, v in zip(first.inputs, first.graph.inputs, strict=True) if name != THRESHOLD}
    builder = ModelBuilder(list(zip(inputs, given.values(), strict=True)))
    crossing = dict(zip(given, builder.inputs, strict=True))
    logits, exit_index, *gates = _answer(builder, segments, 0, crossing, builder.outside)
    macs = _macs(builder, segments, exit_macs, exit_index, gates)
    outputs = [("logits", logits), ("exit_index", exit_index), ("macs", macs)]
    return builder.model([*outputs, *(("gates", opened) for opened in gates)], opset)


def compose_static(inputs: Sequence[str], graph: ir.Graph, outputs: Sequence[str], opset: int) -> ir.Model:
    """A traced graph as an ONNX model whose inputs and outputs have the given names.

    Raises:
        RequestError: an input has the name of an output.
    """
    builder = ModelBuilder(list(zip(inputs, graph.inputs, strict=True)))
    results = builder.inline(graph, builder.inputs, builder.outside, "stage0")
    return builder.model(list(zip(outputs, results, strict=True)), opset)


def _macs(
    builder: ModelBuilder,
    segments: list[Segment],
    exit_macs: Sequence[int],
    exit_index: ir.Value,
    gates: list[ir.Value],
) -> ir.Value:
    """int64 (N,): what each sample cost up to its exit without any gated branch, and the branches that ran for it."""
    scope, spent = builder.outside, list(exit_macs)
    for segment, branches in zip(segments, accumulate(sum(s.branch_macs) for s in segments), strict=True):
        spent[segment.exit] -= branches
    macs = scope.op("Gather", [builder.constant("exits/macs_of", spent), exit_index], "exits/macs", like=exit_index)
    for opened in gates:
        costs = builder.constant("gates/macs_of", [macs for segment in segments for macs in segment.branch_macs])
        ran = scope.op("Where", [opened, costs, builder.constant("zero", 0)], "gates/ran")
        spent_there = scope.op("ReduceSum", [ran, builder.constant("axis_1", [1])], "gates/macs", {"keepdims": 0})
        macs = scope.op("Add", [macs, spent_there], "gates/and_macs", like=exit_index)
    return macs


def _answer(
    builder: ModelBuilder, segments: list[Segment], i: int, crossing: Mapping[str, ir.Value], scope: Scope
) -> list[ir.Value]:
    """Logits (M, C) and exit indices (M,) of the M samples that reach segment `i`, computed in `scope`."""
    segment = segments[i]
    given = [_threshold(builder, segment) if n == THRESHOLD else crossing[n] for n in segment.inputs]
    results = builder.inline(segment.graph, given, scope, f"stage{i}")
    results = skip_branches(builder, scope, segment.branches, results, f"stage{i}")
    live = {**crossing, **dict(zip(segment.outputs, results, strict=False))}
    z = results[len(segment.outputs)]
    here = [z, _exit_number(builder, scope, z, segment.exit, f"stage{i}/exit")]
    here += [live[GATES]] if GATES in live else []
    if i + 1 == len(segments):
        return here
    return _answer_or_go_on(builder, segments, i, live, here, results[-1], scope)


def _answer_or_go_on(
    builder: ModelBuilder, segments: list[Segment], i: int, live: Mapping[str, ir.Value], here: list[ir.Value],
    stay: ir.Value, scope: Scope,
) -> list[ir.Value]:  # fmt: skip
    """What segment `i` answers, overwritten for the samples that stay by what comes after it."""
    prefix = f"stage{i}/exit"
    index, anyone = builder.rows_where(stay, scope, prefix)
    deeper = _deeper(builder, segments, i + 1, live, here, index, Scope(scope))
    unchanged = _unchanged(here, f"stage{i}/all_leave", Scope(scope))
    names = [f"{prefix}/{what}" for what, _ in zip(_ANSWER, here, strict=False)]
    return scope.either(anyone, deeper, unchanged, f"{prefix}/if", names)


def _deeper(
    builder: ModelBuilder, segments: list[Segment], i: int, live: Mapping[str, ir.Value], here: list[ir.Value],
    index: ir.Value, scope: Scope,
) -> ir.Graph:  # fmt: skip
    """The branch where segment `i` and what follows run on the rows `index`."""
    prefix = f"stage{i}"
    crossing = {
        name: scope.op("Gather", [live[name], index], f"{prefix}/in/{name}", {"axis": 0}, like=live[name])
        if name in segments[i - 1].per_sample
        else live[name]
        for name in segments[i].inputs
        if name != THRESHOLD
    }
    answer = _answer(builder, segments, i, crossing, scope)
    rows = scope.op("Unsqueeze", [index, builder.constant("axis_1", [1])], f"{prefix}/out/rows")
    merged = [
        scope.op("ScatterND", [mine, rows, theirs], f"{prefix}/out/{what}", like=mine)
        for what, mine, theirs in zip(_ANSWER, here, answer, strict=False)
    ]
    return scope.graph(merged, prefix)


def _unchanged(here: list[ir.Value], prefix: str, scope: Scope) -> ir.Graph:
    kept = [scope.op("Identity", [v], f"{prefix}/{what}", like=v) for what, v in zip(_ANSWER, here, strict=False)]
    return scope.graph(kept, prefix)


def _threshold(builder: ModelBuilder, segment: Segment) -> ir.Value:
    """What scores are compared with, for the caller of the file to change."""
    assert segment.threshold is not None
    return builder.setting(f"threshold_{segment.exit}", segment.threshold)


def _exit_number(builder: ModelBuilder, scope: Scope, z: ir.Value, number: int, prefix: str) -> ir.Value:
    """int64 (M,): the number of this exit for each of the M rows of `z`."""
    rows = scope.op("Shape", [z], f"{prefix}/rows", {"start": 0, "end": 1})
    filled = scope.op("Expand", [builder.constant(f"exits/number_{number}", number), rows], f"{prefix}/number")
    filled.type = ir.TensorType(ir.DataType.INT64)
    filled.shape = None if z.shape is None else ir.Shape([z.shape[0]])
    return filled
