"""dyncompress: takes a trained, static PyTorch network and gives back a smaller one, a dynamic one, or both."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compress.compare import Comparison, compare
    from .compress.convert import convert
    from .compress.evaluate import evaluate
    from .compress.gating import gate
    from .compress.prune import prune
    from .compress.recalibrate import recalibrate_batchnorm
    from .compress.rewind import retrain
    from .compress.sparsify import sparsify
    from .compress.stream_prune import prune_checkpoint
    from .compress.unstructured import as_sparse, prune_weights
    from .errors import DynCompressError, RequestError
    from .model_zoo.data import load_data
    from .passes.axes import Axis, infer_axes
    from .passes.capture import capture
    from .passes.exits import InsertExits
    from .passes.fold import FoldBatchNorm
    from .passes.gates import InsertGates
    from .passes.low_rank import LowRank
    from .passes.plan import Plan, plan
    from .passes.shrink import mask, shrink
    from .runtime.checkpoint import load, read_info, save
    from .runtime.dynamic import DynamicModel, Prediction
    from .runtime.onnx_export import export_onnx
    from .runtime.policy import ExitPolicy
    from .runtime.stream import shrink_checkpoint
    from .runtime.stream_capture import capture_empty
    from .runtime.verify import Verification, verify

__version__ = "0.1.0"

_HOMES = {
    "passes.axes": ("Axis", "infer_axes"),
    "passes.capture": ("capture",),
    "passes.exits": ("InsertExits",),
    "passes.fold": ("FoldBatchNorm",),
    "passes.gates": ("InsertGates",),
    "passes.low_rank": ("LowRank",),
    "passes.plan": ("Plan", "plan"),
    "passes.shrink": ("mask", "shrink"),
    "compress.compare": ("Comparison", "compare"),
    "compress.convert": ("convert",),
    "compress.evaluate": ("evaluate",),
    "compress.gating": ("gate",),
    "compress.prune": ("prune",),
    "compress.stream_prune": ("prune_checkpoint",),
    "compress.recalibrate": ("recalibrate_batchnorm",),
    "compress.rewind": ("retrain",),
    "compress.sparsify": ("sparsify",),
    "compress.unstructured": ("as_sparse", "prune_weights"),
    "runtime.checkpoint": ("load", "read_info", "save"),
    "runtime.dynamic": ("DynamicModel", "Prediction"),
    "runtime.onnx_export": ("export_onnx",),
    "runtime.policy": ("ExitPolicy",),
    "runtime.verify": ("Verification", "verify"),
    "runtime.stream": ("shrink_checkpoint",),
    "runtime.stream_capture": ("capture_empty",),
    "model_zoo.data": ("load_data",),
    "errors": ("DynCompressError", "RequestError"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Axis",
    "Comparison",
    "DynCompressError",
    "DynamicModel",
    "ExitPolicy",
    "FoldBatchNorm",
    "InsertExits",
    "InsertGates",
    "LowRank",
    "Plan",
    "Prediction",
    "RequestError",
    "Verification",
    "as_sparse",
    "capture",
    "capture_empty",
    "compare",
    "convert",
    "evaluate",
    "export_onnx",
    "gate",
    "infer_axes",
    "load",
    "load_data",
    "mask",
    "plan",
    "prune",
    "prune_checkpoint",
    "prune_weights",
    "read_info",
    "recalibrate_batchnorm",
    "retrain",
    "save",
    "shrink",
    "shrink_checkpoint",
    "sparsify",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that importing the package is quick."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'dyncompress' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
