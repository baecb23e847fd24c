"""The reference models by name: build one with random weights, or load it trained."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import RequestError
from .lstm import LSTMDigits
from .resnet import ResNetDigits
from .vgg import VGGDigits
from .vit import ViTDigits

CHECKPOINTS = Path(__file__).parent / "checkpoints"

ZOO: dict[str, Callable[[], nn.Module]] = {
    "vgg-digits": VGGDigits,
    "resnet-digits": ResNetDigits,
    "vit-digits": ViTDigits,
    "lstm-digits": LSTMDigits,
}


def build(name: str) -> nn.Module:
    """The model NAME with random weights, in training mode.

    Raises RequestError for a name that is not in ZOO.
    """
    if name not in ZOO:
        raise RequestError(f"no reference model is called {name!r}: use one of {', '.join(ZOO)}")
    return ZOO[name]()


def load(name: str) -> nn.Module:
    """The model NAME with its trained weights, float32, in eval mode.

    Raises RequestError for a name that is not in ZOO, or when its checkpoint is missing from the installation.
    """
    model = build(name)
    path = CHECKPOINTS / f"{name}.safetensors"
    if not path.exists():
        raise RequestError(f"{path} is missing: train it with `python -m dyncompress.model_zoo.train {name}`")
    model.load_state_dict(read_checkpoint(path))
    return model.eval()


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file: half-precision ones as float32, integer buffers as they are."""
    tensors = load_file(path)
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def example_input(name: str) -> Tensor:
    """Two random images of the shape NAME reads: (2, 1, 32, 32) float32 in 0..1, the same at every call.

    Raises RequestError for a name that is not in ZOO.
    """
    if name not in ZOO:
        raise RequestError(f"no reference model is called {name!r}: use one of {', '.join(ZOO)}")
    return torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
