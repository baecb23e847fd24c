"""A model as one ONNX file; a dynamic model's file skips the work that its samples do not need."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import onnx
import onnx_ir as ir
from torch import Tensor, fx, nn

from ...errors import DynCompressError, RequestError
from ...passes.graph.copying import deep_copy
from ...passes.graph.inputs import Inputs
from ...passes.graph.meta import inputs_of, is_captured
from ...passes.graph.random_inputs import call_flat, given_inputs, random_inputs
from ..predict.dynamic import DynamicModel, graph_of
from .check import BATCHES, Tolerance, check_file
from .compose import compose, compose_static
from .segments import trace_segments, trace_static
from .trace import quiet

_LEAST_OPSET = 18
_SINGLE_FILE_BYTES = 2_000_000_000  # protobuf holds 2 GiB; the rest is for the graph
_TRACED_SAMPLES = 3  # any number but 0 and 1, which torch.export takes for constants

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class OnnxReport:
    """What was written and how it was checked.

    `max_error`: largest absolute difference of onnxruntime's logits from PyTorch's, by batch size; `exits`: how many of
    the samples checked left at each exit, the end last (a static model: empty); `bytes`: of all files written.
    """

    path: Path
    inputs: list[str]
    outputs: list[str]
    opset: int
    max_error: dict[int, float]
    exits: list[int]
    bytes: int


def export_onnx(
    model: DynamicModel | fx.GraphModule,
    path: str | Path,
    *,
    inputs: Inputs | None = None,
    opset: int = 20,
    tunable: bool = False,
    overwrite: bool = False,
    rtol: float = 1e-3,
    atol: float = 1e-4,
) -> OnnxReport:
    """Writes `model` as one ONNX file and holds it to PyTorch in onnxruntime, on batches of 1, 3 and 64 samples.

    A dynamic model's file gives `logits` (N, C), `exit_index` (N,) int64 and `macs` (N,) int64, as `predict` does; what
    comes after an exit runs on the samples that stay, or not at all. Of a model with skip gates it also gives `gates`
    (N, G) bool, and a branch runs on the samples whose gate is open, or not at all. A static model's file gives the
    model's own outputs, the logits as `logits`. Inputs keep the user's names; the batch and every dim that varies are
    free. Only weights of more than 2 GB lie in a second file, `<path>.data`.

    Args:
        model: a DynamicModel or a captured graph.
        path: the file to write.
        inputs: samples to check the file on, called like the model; None: random ones.
        opset: ONNX operator set, 18 or newer.
        tunable: the thresholds of the exits that are on become inputs `threshold_0`, ... (float32 scalars) that callers
            of the file may leave out; what the policy says is their default.
        overwrite: replace a file that is there.
        rtol, atol: allowed |onnxruntime - PyTorch| <= atol + rtol * |PyTorch|; also how close to its threshold a score
            must be for a sample to leave elsewhere.

    Raises:
        RequestError: the model, path, opset or inputs are wrong.
        DynCompressError: an operator has no ONNX form, or the file does not give PyTorch's results; nothing is written.
    """
    path = Path(path)
    _check_request(model, path, opset, overwrite)
    if tunable:
        _check_tunable(model)
    copied = _cpu_copy(model)
    gm = graph_of(copied)

    def batch(n: int) -> list[Any]:
        if inputs is not None:
            return given_inputs(gm, inputs, n)
        return random_inputs(gm, n, shorter=n == BATCHES[1])  # also at another length than traced

    batch(1)  # what is wrong with the user's inputs shows before the work starts
    made = _to_onnx(copied, random_inputs(gm, _TRACED_SAMPLES), opset, tunable)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = _write(made, Path(folder) / path.name)
        agreement = check_file(written[0], copied, batch, Tolerance(rtol, atol))
        size = sum(file.stat().st_size for file in written)
        for file in reversed(written):  # the model last: it needs its data
            os.replace(file, path.parent / file.name)
    names_in, names_out = ([str(v.name) for v in values] for values in (made.graph.inputs, made.graph.outputs))
    return OnnxReport(path, names_in, names_out, opset, agreement.max_error, agreement.exits, size)


def _data_of(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def _check_request(model: DynamicModel | fx.GraphModule, path: Path, opset: int, overwrite: bool) -> None:
    if not isinstance(model, DynamicModel) and not is_captured(model):
        raise RequestError(
            f"export_onnx takes a DynamicModel or a captured graph, not a {type(model).__name__}: capture it first, "
            "dc.export_onnx(dc.capture(model, example_inputs), path)"
        )
    if not path.parent.is_dir():
        raise RequestError(f"the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise RequestError(f"{path} is a folder; give the name of a file in it")
    for file in (path, _data_of(path)):
        if file.exists() and not overwrite:
            raise RequestError(f"{file} exists; choose another name or pass overwrite=True")
    newest = onnx.defs.onnx_opset_version()
    if not _LEAST_OPSET <= opset <= newest:
        raise RequestError(f"opset={opset}: give one from {_LEAST_OPSET} to {newest}")
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise RequestError("the model's weights are on the meta device; load them before the export")


def _check_tunable(model: DynamicModel | fx.GraphModule) -> None:
    if not isinstance(model, DynamicModel) or all(t is None for t in model.policy.thresholds):
        raise RequestError("tunable: the model has no exit that is on, so that there are no thresholds to tune")


def _cpu_copy(model: M) -> M:
    """A copy on the CPU in evaluation mode; tensors that are there already are shared."""
    return deep_copy(model, {id(t): _on_cpu(t) for t in (*model.parameters(), *model.buffers())}).eval()


def _on_cpu(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    moved = tensor.detach().cpu()
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def _to_onnx(model: DynamicModel | fx.GraphModule, flat: list[Any], opset: int, tunable: bool) -> ir.Model:
    gm = graph_of(model)
    placeholders = gm.graph.find_nodes(op="placeholder")
    names = [str(p.target) for p, x in zip(placeholders, flat, strict=True) if isinstance(x, Tensor)]
    if not isinstance(model, DynamicModel):
        graph, outputs = trace_static(_cpu_copy(model), flat, opset)  # a copy: tracing replaces modules
        return compose_static(names, graph, outputs, opset)
    nobody = [x[:0] if given.per_sample else x for given, x in zip(inputs_of(gm), flat, strict=True)]
    exit_macs = call_flat(model.predict, gm, nobody).exit_macs
    return compose(names, trace_segments(_cpu_copy(model), flat, opset, tunable), exit_macs, opset)


def _write(model: ir.Model, path: Path) -> list[Path]:
    """Saves and checks the model; its file and, for large ones, that of its weights."""
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    weights = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    data = _data_of(path) if weights > _SINGLE_FILE_BYTES else None
    with quiet():
        ir.save(model, path, format="protobuf", external_data=data and data.name, size_threshold_bytes=1024)
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:
        raise DynCompressError(f"the exported model is not valid ONNX: {str(error).splitlines()[0]}") from error
    return [path] if data is None else [path, data]
