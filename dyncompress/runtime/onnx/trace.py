"""A PyTorch module as one ONNX graph, quietly, and the reason in one line where it cannot be one."""

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from ...errors import DynCompressError
from .layer_forms import with_plain_attention

Value = Tensor | int


@dataclass(frozen=True)
class Traced:
    """An ONNX graph, the dims of each of its outputs that vary (None: a number that varies), and what it is made of."""

    graph: ir.Graph
    dynamic: list[list[int] | None]
    program: ExportedProgram


def trace(
    module: nn.Module, inputs: Mapping[str, Value], dynamic: Mapping[str, list[int] | None], opset: int
) -> Traced:
    """Exports `module`, called with `inputs` by position; `dynamic` names the dims of each that vary.

    Raises:
        DynCompressError: torch cannot export it; the message names the operator and the user's own module.
    """
    shapes = tuple(_shape(dynamic[name]) for name in inputs)
    program: ExportedProgram | None = None
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=(shapes,), strict=False)
            program = with_plain_attention(program)
            made = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    except DynCompressError:
        raise
    except Exception as error:
        raise DynCompressError(_explain(module, program, error)) from error
    assert made is not None
    if made.model.opset_imports[""] != opset:
        raise DynCompressError(f"the model cannot be written in ONNX opset {opset}; export it with another opset=")
    returned = program.graph.output_node().args[0]
    outputs = returned[len(returned) - len(made.model.graph.outputs) :]
    return Traced(made.model.graph, [_varies(node) for node in outputs], program)


def _shape(dims: list[int] | None) -> Any:
    """The batch must stay free; what else varied before may turn out to be fixed from here on."""
    if dims is None:
        return Dim.DYNAMIC
    return {d: Dim.DYNAMIC if d == 0 else Dim.AUTO for d in dims}


def _varies(node: Any) -> list[int] | None:
    value = node.meta["val"]
    return [d for d, s in enumerate(value.shape) if not isinstance(s, int)] if isinstance(value, Tensor) else None


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters print, log and warn about their own internals; nothing of it concerns the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- why it failed -----------------------------------------------------------------------------------------------


def _explain(module: nn.Module, program: ExportedProgram | None, error: Exception) -> str:
    """One line: the operator that has no ONNX form and the user's module that calls it, else the first reason."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    found = re.search(r"target=torch\.ops\.(\w+\.\w+\.\w+)", "\n".join(map(str, chain)))
    if found is None or program is None:
        reason = next((line.strip() for line in str(chain[-1]).splitlines() if line.strip()), type(error).__name__)
        return f"the model cannot be exported to ONNX: {reason}"
    op, where = _origin(module, program, found[1])
    return f"ONNX export cannot translate {op}" + (f", called in '{where}'" if where else "")


def _origin(module: nn.Module, program: ExportedProgram, op: str) -> tuple[str, str]:
    """The operator of the user's model that `op` is, or is part of, and the dotted name of the module that calls it."""
    name = op.split(".")[1]
    for graph in (m.graph for m in module.modules() if isinstance(m, fx.GraphModule)):
        for node in graph.nodes:
            if name in str(node.target) and node.op == "call_function":
                return str(node.target), str(node.meta.get("path", ""))
    for node in program.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if name in str(node.target) and stack:
            return str(node.target), f".{stack[-1][0]}".rpartition(".trunk.")[2]
    return op, ""
