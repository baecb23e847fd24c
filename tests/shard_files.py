"""Checkpoints of a language model, written in shards."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from nets import LanguageModel
from safetensors.torch import save_file
from torch import Tensor, fx, nn

import dyncompress as dc

INDEX = "model.safetensors.index.json"
TOKENS = {"tokens": torch.arange(24).reshape(2, 12) % 40}


def trained(tied: bool = False, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model with weights of its own; the buffers too."""
    torch.manual_seed(1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LanguageModel(tied).eval()
    finally:
        torch.set_default_dtype(before)
    model.steps.fill_(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 5)
    return model


def write_shards(folder: Path, tensors: Mapping[str, Tensor], count: int = 3) -> Path:
    """A checkpoint in `count` shards and an index, as other programs write it."""
    folder.mkdir(parents=True)
    names, where = list(tensors), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        mine = names[number::count]
        save_file({name: tensors[name].contiguous() for name in mine}, folder / file)
        where |= dict.fromkeys(mine, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def state(model: nn.Module, *without: str) -> dict[str, Tensor]:
    """A state dict with tensors of their own."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in without}


@cache
def empty(tied: bool = False, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """The captured model without its parameters."""
    return dc.capture_empty(lambda: LanguageModel(tied).eval(), TOKENS, dtype=dtype)


@cache
def captured(tied: bool = False, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """The captured model with its weights, as it would be loaded."""
    return dc.capture(trained(tied, dtype), TOKENS)


def some(gm: fx.GraphModule) -> dict[str, list[int]]:
    """Kept indices of every axis that can shrink: scattered, with gaps of different lengths."""
    generator = torch.Generator().manual_seed(0)
    widths = [axis for axis in dc.infer_axes(gm).prunable if axis.size > 1]
    return {
        axis.name: torch.randperm(axis.size, generator=generator)[: max(1, axis.size * 5 // 8)].sort().values.tolist()
        for axis in widths
    }


def shrink(gm: fx.GraphModule, source: Path, out: Path, **options: Any) -> Path:
    """Shrinks a checkpoint to `some` of it, in shards so small that there are several."""
    return dc.shrink_checkpoint(
        gm, some(gm), source, out, **({"progress": False, "resume": True, "max_shard_bytes": 9000} | options)
    )


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
