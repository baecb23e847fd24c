"""Exported files in onnxruntime, for benchmarks that time them beside PyTorch."""

from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
from torch import Tensor

import dyncompress as dc


def in_onnxruntime(models: dict[str, Any], folder: str, outputs: list[str] | None = None) -> dict[str, Any]:
    """What runs each model's exported file on one thread; `outputs` to compute, None: all."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    runs = {}
    for name, model in models.items():
        path = Path(folder) / f"{name}.onnx"
        dc.export_onnx(model, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        runs[name] = partial(_run, session, session.get_inputs()[0].name, outputs)
    return runs


def _run(session: onnxruntime.InferenceSession, name: str, outputs: list[str] | None, x: Tensor) -> Any:
    return session.run(outputs, {name: x.numpy()})
