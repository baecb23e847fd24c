"""Holds an exported file to PyTorch: the same answers, exits, gates and MACs in onnxruntime at several batch sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...errors import DynCompressError
from ...passes.exits.stages import split_stages, with_outputs
from ...passes.gates.read_gates import graph_gates
from ...passes.graph.random_inputs import call_flat
from ..predict.dynamic import DynamicModel, Prediction
from ..predict.policy import State

BATCHES = (1, 3, 64)

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Tolerance:
    """|onnxruntime - PyTorch| <= atol + rtol * |PyTorch|."""

    rtol: float
    atol: float

    def allows(self, got: Tensor, wanted: Tensor) -> bool:
        """Whether all elements are close enough."""
        return torch.allclose(got.double(), wanted.double(), self.rtol, self.atol)

    def __str__(self) -> str:
        return f"rtol={self.rtol:g}, atol={self.atol:g}"


@dataclass(frozen=True)
class Agreement:
    """Largest absolute error by batch size, and how many samples left at each exit (static: none)."""

    max_error: dict[int, float]
    exits: list[int]


def check_file(
    path: Path, model: DynamicModel | fx.GraphModule, batch: Callable[[int], list[Any]], tolerance: Tolerance
) -> Agreement:
    """Runs the file and the model on the same batches.

    Args:
        path: the ONNX file.
        model: what it was exported from, on the CPU, in evaluation mode.
        batch: makes the flat inputs of that many samples.
        tolerance: for outputs, for scores beside their threshold and for the logits of gates beside 0.

    Raises:
        DynCompressError: onnxruntime cannot run the file, or its results are not PyTorch's.
    """
    session = _session(path)
    max_error: dict[int, float] = {}
    exits = torch.zeros(len(model.exits) + 1 if isinstance(model, DynamicModel) else 0, dtype=torch.int64)
    for n in BATCHES:
        flat = batch(n)
        got = _run(session, flat, n)
        if isinstance(model, DynamicModel):
            max_error[n] = _compare_predictions(model, flat, got, tolerance, n)
            exits += torch.bincount(got["exit_index"], minlength=len(exits))
        else:
            max_error[n] = _compare_outputs(model, flat, got, tolerance, n)
    return Agreement(max_error, exits.tolist())


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised, not printed
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DynCompressError(f"onnxruntime cannot load the exported model: {_first_line(error)}") from error


def _run(session: onnxruntime.InferenceSession, flat: list[Any], n: int) -> Results:
    tensors = [x.numpy() for x in flat if isinstance(x, Tensor)]
    feed = dict(zip((i.name for i in session.get_inputs()), tensors, strict=True))
    try:
        results = session.run(None, feed)
    except Exception as error:
        raise DynCompressError(
            f"onnxruntime fails on the exported model at batch size {n}: {_first_line(error)}"
        ) from error
    return {o.name: torch.as_tensor(r) for o, r in zip(session.get_outputs(), results, strict=True)}


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _in_torch(function: Callable[..., Any], gm: fx.GraphModule, flat: list[Any]) -> Any:
    """What PyTorch itself makes of a batch."""
    try:
        with torch.no_grad():
            return call_flat(function, gm, flat)
    except Exception as error:
        raise DynCompressError(
            f"the model fails in PyTorch on the samples to check its file on: {_first_line(error)}; give it samples of "
            "your own as inputs="
        ) from error


def _compare_outputs(gm: fx.GraphModule, flat: list[Any], got: Results, tolerance: Tolerance, n: int) -> float:
    wanted = [x for x in pytree.tree_leaves(_in_torch(gm, gm, flat)) if isinstance(x, Tensor)]
    errors = [
        _error(got[name], value, tolerance, f"output '{name}'", n) for name, value in zip(got, wanted, strict=True)
    ]
    return max(errors)


def _compare_predictions(model: DynamicModel, flat: list[Any], got: Results, tolerance: Tolerance, n: int) -> float:
    wanted: Prediction = _in_torch(model.predict, model.trunk, flat)
    same = got["exit_index"] == wanted.exit_index
    if wanted.gates is not None:
        same &= (got["gates"] == wanted.gates).all(1)
    if not same.all():
        rows = _excuse_gates(model, flat, torch.nonzero(~same).flatten().tolist(), got, wanted, tolerance, n)
        _excuse(model, flat, rows, got["exit_index"], wanted, tolerance, n)
    if not torch.equal(got["macs"][same], wanted.macs[same]):
        raise DynCompressError(f"the ONNX file counts other MACs than PyTorch at batch size {n}")
    return _error(got["logits"][same], wanted.logits[same], tolerance, "logits", n)


def _error(got: Tensor, wanted: Tensor, tolerance: Tolerance, what: str, n: int) -> float:
    """The largest absolute error."""
    if got.shape != wanted.shape:
        raise DynCompressError(
            f"the ONNX file disagrees with PyTorch at batch size {n}: {what} has shape {tuple(got.shape)} instead of "
            f"{tuple(wanted.shape)}"
        )
    error = float((got.double() - wanted.double()).abs().max()) if got.numel() else 0.0
    if not tolerance.allows(got, wanted):
        raise DynCompressError(
            f"the ONNX file disagrees with PyTorch at batch size {n}: {what} off by {error:.3g} "
            f"(allowed: {tolerance}); loosen rtol= or atol=, or check it on your own data with inputs="
        )
    return error


def _excuse_gates(
    model: DynamicModel,
    flat: list[Any],
    rows: list[int],
    got: Results,
    wanted: Prediction,
    tolerance: Tolerance,
    n: int,
) -> list[int]:
    """A gate may decide otherwise when its logit is as good as 0; returns the rows where none did before an exit."""
    if wanted.gates is None:
        return rows
    gates, stages = graph_gates(model.trunk), split_stages(model.trunk)
    logits = _in_torch(with_outputs(model.trunk, [gate.logit for gate in gates]), model.trunk, flat)[1]
    left = []
    for row in rows:
        until = min(int(got["exit_index"][row]), int(wanted.exit_index[row]))
        count = sum(len(stage.branch_macs) for stage in stages[: until + 1])
        other = torch.nonzero(got["gates"][row, :count] != wanted.gates[row, :count]).flatten().tolist()
        if not other:
            left.append(row)
            continue
        logit = logits[other[0]][row]  # what follows a gate that decided otherwise differs rightly
        if not tolerance.allows(logit, torch.zeros_like(logit)):
            raise DynCompressError(
                f"the ONNX file disagrees with PyTorch at batch size {n}: the gate of '{gates[other[0]].branch}' "
                f"decides otherwise for sample {row}, its logit {float(logit):.6g} off 0"
            )
    return left


def _excuse(
    model: DynamicModel, flat: list[Any], rows: list[int], got: Tensor, wanted: Prediction, tolerance: Tolerance, n: int
) -> None:
    """A sample may leave elsewhere when its score is as good as equal to the threshold."""
    policy, all_logits = model.policy, _in_torch(model.all_logits, model.trunk, flat)
    for row in rows:
        k = min(int(got[row]), int(wanted.exit_index[row]))
        threshold = policy.thresholds[k]
        state: State = ()
        for before in (j for j in range(k) if policy.is_on(j)):
            _, state = policy.score(before, all_logits[before][row : row + 1], state)
        score, _ = policy.score(k, all_logits[k][row : row + 1], state)
        if threshold is None or not tolerance.allows(score, torch.full_like(score, threshold)):
            raise DynCompressError(
                f"the ONNX file disagrees with PyTorch at batch size {n}: sample {row} leaves at exit {int(got[row])} "
                f"instead of {int(wanted.exit_index[row])}, its score {float(score):.6g} off the threshold {threshold}"
            )
