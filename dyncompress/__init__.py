"""dyncompress: takes a trained, static PyTorch network and gives back a smaller one, a dynamic one, or both."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compress.evaluation.evaluate import evaluate
    from .compress.exits.convert import convert
    from .compress.exits.convert_report import ConvertReport, PerPositionReport
    from .compress.gates.gate import gate
    from .compress.gates.gate_report import GateReport
    from .compress.pruning.compare import Comparison, compare
    from .compress.pruning.prune import prune
    from .compress.pruning.prune_checkpoint import prune_checkpoint
    from .compress.pruning.reports import PruneReport, PruneWeightsReport
    from .compress.pruning.unstructured import as_sparse, prune_weights
    from .compress.sparsity.retrain import retrain
    from .compress.sparsity.sparsify import sparsify
    from .compress.sparsity.sparsify_report import SparsifyReport
    from .compress.training.recalibrate import recalibrate_batchnorm
    from .errors import DynCompressError, RequestError
    from .model_zoo.load_data import load_data
    from .passes.axes.axes import Axis, infer_axes
    from .passes.capture.capture import capture
    from .passes.capture.capture_empty import capture_empty
    from .passes.exits.insert_exits import InsertExits
    from .passes.exits.keep_exits import KeepExits
    from .passes.gates.insert_gates import InsertGates
    from .passes.gates.remove_gates import RemoveGates
    from .passes.gates.settle_gates import SettleGates
    from .passes.pipeline import Pipeline
    from .passes.rewrites.fold_batch_norm import FoldBatchNorm
    from .passes.rewrites.low_rank import LowRank
    from .passes.rewrites.unstack_recurrent import UnstackRecurrent
    from .passes.shrink.plan import Plan, plan
    from .passes.shrink.shrink import Shrink, mask, shrink
    from .passes.shrink.verify import Verification, verify
    from .runtime.files.checkpoint import load, read_info, save
    from .runtime.onnx.export import export_onnx
    from .runtime.predict.dynamic import DynamicModel, Prediction
    from .runtime.predict.policy import ExitPolicy
    from .runtime.sharded.shrink_checkpoint import shrink_checkpoint

__version__ = "0.1.0"

_HOMES = {
    "passes.axes.axes": ("Axis", "infer_axes"),
    "passes.capture.capture": ("capture",),
    "passes.exits.insert_exits": ("InsertExits",),
    "passes.exits.keep_exits": ("KeepExits",),
    "passes.rewrites.fold_batch_norm": ("FoldBatchNorm",),
    "passes.gates.insert_gates": ("InsertGates",),
    "passes.gates.remove_gates": ("RemoveGates",),
    "passes.gates.settle_gates": ("SettleGates",),
    "passes.pipeline": ("Pipeline",),
    "passes.rewrites.low_rank": ("LowRank",),
    "passes.rewrites.unstack_recurrent": ("UnstackRecurrent",),
    "passes.shrink.plan": ("Plan", "plan"),
    "passes.shrink.shrink": ("Shrink", "mask", "shrink"),
    "compress.pruning.compare": ("Comparison", "compare"),
    "compress.exits.convert": ("convert",),
    "compress.exits.convert_report": ("ConvertReport", "PerPositionReport"),
    "compress.evaluation.evaluate": ("evaluate",),
    "compress.gates.gate": ("gate",),
    "compress.gates.gate_report": ("GateReport",),
    "compress.pruning.prune": ("prune",),
    "compress.pruning.prune_checkpoint": ("prune_checkpoint",),
    "compress.pruning.reports": ("PruneReport", "PruneWeightsReport"),
    "compress.training.recalibrate": ("recalibrate_batchnorm",),
    "compress.sparsity.retrain": ("retrain",),
    "compress.sparsity.sparsify": ("sparsify",),
    "compress.sparsity.sparsify_report": ("SparsifyReport",),
    "compress.pruning.unstructured": ("as_sparse", "prune_weights"),
    "runtime.files.checkpoint": ("load", "read_info", "save"),
    "runtime.predict.dynamic": ("DynamicModel", "Prediction"),
    "runtime.onnx.export": ("export_onnx",),
    "runtime.predict.policy": ("ExitPolicy",),
    "passes.shrink.verify": ("Verification", "verify"),
    "runtime.sharded.shrink_checkpoint": ("shrink_checkpoint",),
    "passes.capture.capture_empty": ("capture_empty",),
    "model_zoo.load_data": ("load_data",),
    "errors": ("DynCompressError", "RequestError"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Axis",
    "Comparison",
    "ConvertReport",
    "DynCompressError",
    "DynamicModel",
    "ExitPolicy",
    "FoldBatchNorm",
    "GateReport",
    "InsertExits",
    "InsertGates",
    "KeepExits",
    "LowRank",
    "PerPositionReport",
    "Pipeline",
    "Plan",
    "Prediction",
    "PruneReport",
    "PruneWeightsReport",
    "RemoveGates",
    "RequestError",
    "SettleGates",
    "Shrink",
    "SparsifyReport",
    "UnstackRecurrent",
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
