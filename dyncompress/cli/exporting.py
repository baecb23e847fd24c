"""A model as one ONNX file."""

from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from ..passes.capture import capture
from ..runtime.dynamic import DynamicModel
from ..runtime.recipe import Recipe
from .subject import load_splits, prepare


def write_onnx(model: nn.Module, example_inputs: Any, path: Path, *, overwrite: bool) -> Any:
    """Exports any model."""
    from ..runtime.onnx_export import export_onnx

    gm = model if isinstance(model, DynamicModel) else capture(model, example_inputs)
    return export_onnx(gm, path, overwrite=overwrite)


def export_model(
    recipe: Recipe, path: Path, console: Console, *, overwrite: bool = False, allow_pickle: bool = False
) -> dict[str, Any]:
    raise NotImplementedError
