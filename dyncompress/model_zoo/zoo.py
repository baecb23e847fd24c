"""The reference models by name: build one with random weights, or load one of those that come trained."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import RequestError
from .networks.convnets import AlexNet, LeNet
from .networks.encoder import TextEncoder
from .networks.language import LSTMLanguageModel, RHNLanguageModel
from .networks.lstm import LSTMDigits
from .networks.msdnet import MSDNet
from .networks.reader import BiDAF
from .networks.resnet import ResNetCifar
from .networks.vgg import VGG
from .networks.vit import ViTDigits

CHECKPOINTS = Path(__file__).parent / "checkpoints"


@dataclass(frozen=True)
class Reference:
    """A model of the zoo: how it is made, and the inputs of one call with two samples.

    trained: whether its weights come with the package.
    """

    make: Callable[..., nn.Module]
    example: Callable[[], Any]
    trained: bool = False


def _images(channels: int, size: int = 32) -> Tensor:
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def _ids(*lengths: int) -> Any:
    """Token ids below ten: one tensor (2, length) or a tuple of them."""
    generator = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(1, 10, (2, length), generator=generator) for length in lengths)
    return ids if len(ids) > 1 else ids[0]


_GREY, _COLOUR = partial(_images, 1), partial(_images, 3)

ZOO: dict[str, Reference] = {
    "vgg-digits": Reference(VGG, _GREY, trained=True),
    "resnet-digits": Reference(partial(ResNetCifar, depth=20, channels=1, width=24), _GREY, trained=True),
    "vit-digits": Reference(ViTDigits, _GREY, trained=True),
    "lstm-digits": Reference(LSTMDigits, _GREY, trained=True),
    "lenet": Reference(LeNet, partial(_images, 1, 28)),
    "alexnet-cifar": Reference(AlexNet, _COLOUR),
    "vgg-cifar": Reference(partial(VGG, channels=3), _COLOUR),
    **{f"resnet{n}-cifar": Reference(partial(ResNetCifar, depth=n), _COLOUR) for n in (20, 32, 38, 56, 74, 110)},
    "msdnet-cifar": Reference(MSDNet, _COLOUR),
    "lstm-lm": Reference(LSTMLanguageModel, partial(_ids, 16)),
    "rhn-lm": Reference(RHNLanguageModel, partial(_ids, 16)),
    "bidaf": Reference(BiDAF, partial(_ids, 16, 8)),
    "text-encoder": Reference(TextEncoder, partial(_ids, 16)),
}


def find(name: str) -> Reference:
    """Raises RequestError for a name that is not in ZOO."""
    if name not in ZOO:
        raise RequestError(f"no reference model is called {name!r}: use one of {', '.join(ZOO)}")
    return ZOO[name]


def build(name: str, **options: Any) -> nn.Module:
    """The model NAME with random weights, in training mode; options are its constructor's arguments.

    Raises RequestError for a name that is not in ZOO, and for options that its constructor does not take.
    """
    make = find(name).make
    try:
        return make(**options)
    except RequestError:
        raise
    except Exception as error:  # sizes that torch refuses raise many types
        raise RequestError(f"{name} cannot be built: {error}") from error


def load(name: str) -> nn.Module:
    """The model NAME with its trained weights, float32, in eval mode.

    Raises RequestError for a name that is not in ZOO, for one that does not come trained, or when its checkpoint is
    missing from the installation.
    """
    if not find(name).trained:
        raise RequestError(f"{name} comes without trained weights: build it with random ones and train it")
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


def example_input(name: str) -> Any:
    """Two random samples of what NAME reads, the same at every call: images float32 in 0..1, or token ids int64.

    A tensor, or a tuple of them for a model with several inputs. Raises RequestError for a name that is not in ZOO.
    """
    return find(name).example()
