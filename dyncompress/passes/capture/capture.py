"""Capture: a model becomes a torch.fx graph of ATen operators and standard modules.

It is recorded (`recording`, milliseconds), or exported where a recording cannot vouch for itself (`torch.export`,
seconds).

The batch is dynamic: the example is taken at a prime batch so that it never looks like a channel count.
Integer inputs (token ids, masks) also get dynamic trailing dims where the model allows it.
"""

import io
import linecache
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from ...errors import RequestError
from ..graph.cost import CAPTURE_BATCH
from ..graph.inputs import Inputs, split_inputs
from ..graph.meta import is_captured
from ..graph.restoring import evaluating, untouched
from .lift import lift
from .opaque_recurrent import opaque_recurrent_layers
from .recording import Unrecorded
from .symbolic_sizes import recorded

_log = logging.getLogger(__name__)


def capture(model: nn.Module, example_inputs: Inputs) -> fx.GraphModule:
    """Captures `model` as a `torch.fx.GraphModule` that prints, trains, saves and computes like the model itself.

    Standard layers come back as modules under their own dotted names. The result owns copies of the parameters; the
    model is not touched. Stochastic depth and attention-internal dropout, which evaluation mode leaves out, are not
    captured.

    Args:
        model: any module torch.export can trace; on any device, the meta device too.
        example_inputs: one call's inputs, batch first: a tensor, a tuple of positional inputs or a dict of keywords.

    Raises:
        RequestError: torch.export refuses the model; the message names the line of the model's own source.
    """
    if is_captured(model):
        return model
    if not isinstance(model, nn.Module):
        raise RequestError(f"expected a torch.nn.Module to capture, got {type(model).__name__}")
    args, kwargs = _rebatch(split_inputs(example_inputs))
    with _capture_mode(model):
        try:
            graph, owner = recorded(model, args, kwargs, CAPTURE_BATCH), model
        except Unrecorded as reason:
            _log.debug("%s goes through torch.export: %s", type(model).__name__, reason)
            with untouched(model):
                owner = _export(model, args, kwargs).module(check_guards=False)
            graph = owner.graph
    return lift(graph, owner, model)


def _rebatch(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call at the capture batch; shapes are all that export reads, so nothing is filled in."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.dim() > 0]
    if not tensors:
        raise RequestError("example_inputs holds no tensor with a batch dimension; give one call's inputs")
    batch = tensors[0].shape[0]
    if batch == 0:
        raise RequestError("example_inputs has 0 samples; give at least one")

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != batch:
            return leaf
        return leaf.new_empty(CAPTURE_BATCH, *leaf.shape[1:])

    return pytree.tree_map(resize, inputs)


def _dynamic_dims(leaf: Any) -> dict[int, Any] | None:
    if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != CAPTURE_BATCH:
        return None
    tokens = not leaf.is_floating_point()
    return {0: Dim.DYNAMIC} | (dict.fromkeys(range(1, leaf.dim()), Dim.AUTO) if tokens else {})


@contextmanager
def _capture_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients on (so that no fused inference kernel is taken), everything restored afterwards."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), torch.enable_grad(), opaque_recurrent_layers():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    shapes = _as_export_shapes(args, kwargs, pytree.tree_map(_dynamic_dims, (args, kwargs)))
    try:
        with _quiet():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(_explain(model, error)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export prints the whole graph and logs when it refuses a model; the error says what matters."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _as_export_shapes(args: tuple[Any, ...], kwargs: dict[str, Any], shapes: tuple[Any, Any]) -> Any:
    """torch.export wants positional shapes as a tuple and keyword shapes by name."""
    if not kwargs:
        return shapes[0]
    if not args:
        return shapes[1]
    raise RequestError("give example_inputs either as a tuple of positional inputs or as a dict, not both")


def _explain(model: nn.Module, error: Exception) -> str:
    """One line: the model's source line that torch.export refused, the reason, what to change."""
    torch_root, own_root = str(Path(torch.__file__).parent), str(Path(__file__).parents[2])
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith((torch_root, own_root, "<")) and "contextlib" not in f.filename
    ]
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    name = type(model).__name__
    if not frames:
        return f"torch.export cannot capture {name}: {reason}"
    where = frames[-1]
    source = (where.line or linecache.getline(where.filename, where.lineno or 0)).strip()
    return (
        f"torch.export cannot capture {name} at {where.filename}:{where.lineno} `{source}`: {reason} "
        "- rewrite that line without data-dependent Python control flow, sizes or side effects"
    )
