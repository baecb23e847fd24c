"""dyncompress: takes a trained, static PyTorch network and gives back a smaller one, a dynamic one, or both."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for tools that read types; a test compares
    from .cli.runs.run_recipe import run_recipe as run_recipe
    from .cli.runs.run_report import RunReport as RunReport
    from .compress.evaluation.evaluate import Evaluation as Evaluation
    from .compress.evaluation.evaluate import evaluate as evaluate
    from .compress.exits.convert import convert as convert
    from .compress.exits.convert_report import ConvertReport as ConvertReport
    from .compress.exits.convert_report import PerPositionReport as PerPositionReport
    from .compress.gates.gate import gate as gate
    from .compress.gates.gate_report import GateReport as GateReport
    from .compress.options.limits import Limits as Limits
    from .compress.options.method_options import Cuts as Cuts
    from .compress.options.method_options import Lasso as Lasso
    from .compress.options.method_options import Leaving as Leaving
    from .compress.options.method_options import Samples as Samples
    from .compress.options.training_options import Run as Run
    from .compress.options.training_options import Training as Training
    from .compress.pruning.baselines import low_rank as low_rank
    from .compress.pruning.baselines import prune_weights as prune_weights
    from .compress.pruning.compare import Comparison as Comparison
    from .compress.pruning.compare import compare as compare
    from .compress.pruning.prune import prune as prune
    from .compress.pruning.prune_checkpoint import prune_checkpoint as prune_checkpoint
    from .compress.pruning.reports import PruneReport as PruneReport
    from .compress.pruning.reports import PruneWeightsReport as PruneWeightsReport
    from .compress.pruning.unstructured import as_sparse as as_sparse
    from .compress.recipes.recipe import Recipe as Recipe
    from .compress.recipes.recipe import read_recipe as read_recipe
    from .compress.sparsity.group_lasso import GroupLasso as GroupLasso
    from .compress.sparsity.retrain import reinit as reinit
    from .compress.sparsity.retrain import retrain as retrain
    from .compress.sparsity.retrain import rewind as rewind
    from .compress.sparsity.sparsify import sparsify as sparsify
    from .compress.sparsity.sparsify_report import SparsifyReport as SparsifyReport
    from .compress.thresholds.risk import control_risk as control_risk
    from .compress.training.recalibrate import recalibrate_batchnorm as recalibrate_batchnorm
    from .errors import DynCompressError as DynCompressError
    from .errors import RequestError as RequestError
    from .model_zoo.load_data import load_data as load_data
    from .passes.axes.axes import Axes as Axes
    from .passes.axes.axes import Axis as Axis
    from .passes.axes.axes import infer_axes as infer_axes
    from .passes.capture.capture import capture as capture
    from .passes.capture.capture_empty import capture_empty as capture_empty
    from .passes.exits.insert_exits import InsertExits as InsertExits
    from .passes.exits.keep_exits import KeepExits as KeepExits
    from .passes.gates.insert_gates import InsertGates as InsertGates
    from .passes.gates.remove_gates import RemoveGates as RemoveGates
    from .passes.gates.settle_gates import SettleGates as SettleGates
    from .passes.graph.graph_pass import GraphPass as GraphPass
    from .passes.graph.graph_pass import PassResult as PassResult
    from .passes.pipeline import Pipeline as Pipeline
    from .passes.rewrites.fold_batch_norm import FoldBatchNorm as FoldBatchNorm
    from .passes.rewrites.low_rank import LowRank as LowRank
    from .passes.rewrites.unstack_recurrent import UnstackRecurrent as UnstackRecurrent
    from .passes.shrink.plan import Plan as Plan
    from .passes.shrink.plan import plan as plan
    from .passes.shrink.shrink import Shrink as Shrink
    from .passes.shrink.shrink import mask as mask
    from .passes.shrink.shrink import shrink as shrink
    from .passes.shrink.verify import Verification as Verification
    from .passes.shrink.verify import verify as verify
    from .runtime.files.checkpoint import load as load
    from .runtime.files.checkpoint import read_info as read_info
    from .runtime.files.checkpoint import save as save
    from .runtime.onnx.export import OnnxReport as OnnxReport
    from .runtime.onnx.export import export_onnx as export_onnx
    from .runtime.predict.dynamic import DynamicModel as DynamicModel
    from .runtime.predict.dynamic import Prediction as Prediction
    from .runtime.predict.policy import ExitPolicy as ExitPolicy
    from .runtime.sharded.shrink_checkpoint import shrink_checkpoint as shrink_checkpoint

__version__ = "0.1.0"

_NAMES = {
    "errors": "DynCompressError RequestError",
    "passes.capture.capture": "capture",
    "passes.capture.capture_empty": "capture_empty",
    "passes.axes.axes": "Axes Axis infer_axes",
    "passes.shrink.plan": "Plan plan",
    "passes.shrink.shrink": "Shrink mask shrink",
    "passes.shrink.verify": "Verification verify",
    "passes.exits.insert_exits": "InsertExits",
    "passes.exits.keep_exits": "KeepExits",
    "passes.gates.insert_gates": "InsertGates",
    "passes.gates.remove_gates": "RemoveGates",
    "passes.gates.settle_gates": "SettleGates",
    "passes.graph.graph_pass": "GraphPass PassResult",
    "passes.pipeline": "Pipeline",
    "passes.rewrites.unstack_recurrent": "UnstackRecurrent",
    "passes.rewrites.fold_batch_norm": "FoldBatchNorm",
    "passes.rewrites.low_rank": "LowRank",
    "compress.options.training_options": "Run Training",
    "compress.options.limits": "Limits",
    "compress.options.method_options": "Cuts Lasso Leaving Samples",
    "compress.pruning.prune": "prune",
    "compress.pruning.prune_checkpoint": "prune_checkpoint",
    "compress.pruning.baselines": "low_rank prune_weights",
    "compress.pruning.unstructured": "as_sparse",
    "compress.pruning.compare": "Comparison compare",
    "compress.sparsity.sparsify": "sparsify",
    "compress.sparsity.retrain": "reinit retrain rewind",
    "compress.sparsity.group_lasso": "GroupLasso",
    "compress.exits.convert": "convert",
    "compress.gates.gate": "gate",
    "compress.thresholds.risk": "control_risk",
    "compress.evaluation.evaluate": "Evaluation evaluate",
    "compress.training.recalibrate": "recalibrate_batchnorm",
    "compress.recipes.recipe": "Recipe read_recipe",
    "cli.runs.run_recipe": "run_recipe",
    "runtime.predict.dynamic": "DynamicModel Prediction",
    "runtime.predict.policy": "ExitPolicy",
    "runtime.files.checkpoint": "load read_info save",
    "runtime.sharded.shrink_checkpoint": "shrink_checkpoint",
    "runtime.onnx.export": "OnnxReport export_onnx",
    "compress.exits.convert_report": "ConvertReport PerPositionReport",
    "compress.gates.gate_report": "GateReport",
    "compress.pruning.reports": "PruneReport PruneWeightsReport",
    "compress.sparsity.sparsify_report": "SparsifyReport",
    "cli.runs.run_report": "RunReport",
    "model_zoo.load_data": "load_data",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that importing the package is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dyncompress' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
