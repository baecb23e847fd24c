"""A small language model with what large checkpoints have, and checkpoints of it written in shards."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dyncompress as dc

INDEX = "model.safetensors.index.json"
TOKENS = {"tokens": torch.arange(24).reshape(2, 12) % 40}


class Layer(nn.Module):
    """Attention and a gated MLP, each behind a norm and around a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(32), nn.RMSNorm(32)
        self.qkv, self.out = nn.Linear(32, 3 * 32, bias=False), nn.Linear(32, 32, bias=False)
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((32, 72), (32, 72), (72, 32)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Tiny(nn.Module):
    """Token ids (B, T) to logits (B, T, 40). The scale is computed, and in no checkpoint."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)
        self.layers, self.norm = nn.ModuleList(Layer() for _ in range(2)), nn.LayerNorm(32)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 32), persistent=False)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.scale + self.steps
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def trained(tied: bool = False, dtype: torch.dtype = torch.float32) -> Tiny:
    """A model with weights of its own; the buffers too."""
    torch.manual_seed(1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = Tiny(tied).eval()
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
    return dc.capture_empty(lambda: Tiny(tied).eval(), TOKENS, dtype=dtype)


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


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
