"""Capturing a model that is larger than memory: parameters without values, everything that is computed with them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..graph.inputs import Inputs
from .capture import capture


def capture_empty(
    build: Callable[[], nn.Module], example_inputs: Inputs, *, dtype: torch.dtype | None = None
) -> fx.GraphModule:
    """Captures the model that `build` makes without memory for its parameters.

    Parameters are on the meta device. Buffers that the constructor computes (rotary frequencies, masks) keep their
    values, because no checkpoint stores those outside the state dict.

    Args:
        build: makes the model, such as ``lambda: LlamaForCausalLM(config)``.
        example_inputs: as for `capture`.
        dtype: of the parameters and of floating inputs, where the constructor does not say itself; None = float32.

    Raises:
        RequestError: as `capture`.
    """
    return capture_on_meta(build_empty(build, dtype), example_inputs, dtype)


def build_empty(build: Callable[[], nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
    """The model that `build` makes, its parameters on the meta device, its buffers with their values."""
    with _default_dtype(dtype), _parameters_on_meta():
        return build()


def capture_on_meta(model: nn.Module, example_inputs: Inputs, dtype: torch.dtype | None = None) -> fx.GraphModule:
    """Captures what `build_empty` made, which moves to the meta device; the captured model has its buffers' values.

    Raises:
        RequestError: as `capture`.
    """
    values = {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if not buffer.is_meta}

    def on_meta(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to("meta", dtype if dtype is not None and leaf.is_floating_point() else leaf.dtype)

    gm = capture(model.to("meta"), pytree.tree_map(on_meta, example_inputs))
    for path, module in gm.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{path}.{name}".lstrip(".")
            if buffer is not None and buffer.is_meta and full in values:
                module._buffers[name] = values[full]
    return gm


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter loses its values the moment a module gets it; it stays the same object, so that ties hold."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            torch.utils.swap_tensors(param, nn.Parameter(param.detach().to("meta"), param.requires_grad))
        register(module, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
