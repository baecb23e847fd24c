"""Models of other libraries by name, with random weights: timm, torchvision, Hugging Face transformers.

The libraries are optional; each is imported where it is used.
"""

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RequestError

# What makes a configuration of transformers small; a model takes those that its configuration knows.
_SMALL = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "image_size": 32,
    "patch_size": 8,
    "d_ff": 128,
    "d_kv": 16,
    "word_embed_proj_dim": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_source_positions": 50,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BATCH, _TOKENS = 2, 16

Made = tuple[nn.Module, Any]  # a model in eval mode and example inputs that it takes


def library(name: str) -> ModuleType:
    """The optional library NAME. Raises RequestError saying how to install it."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise RequestError(f"{name} cannot be imported ({error}): pip install 'dyncompress[{name}]'") from error


def from_timm(name: str, options: Mapping[str, Any]) -> Made:
    """timm.create_model(NAME, **options), and images of the size that its default configuration names."""
    timm = library("timm")
    try:
        model = timm.create_model(name, **options)
    except (RuntimeError, TypeError) as error:
        raise RequestError(f"timm cannot make {name!r}: {error}") from error
    channels, height, width = model.default_cfg["input_size"]
    return model.eval(), torch.rand(_BATCH, options.get("in_chans", channels), height, width)


def from_torchvision(name: str, options: Mapping[str, Any]) -> Made:
    """torchvision.models.get_model(NAME, **options), and images of 224x224 (299x299 for inception_v3)."""
    models = library("torchvision").models
    # These two warn unless told whether to draw their weights slowly.
    told = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    try:
        model = models.get_model(name, **{**told, **options})
    except (ValueError, TypeError) as error:
        raise RequestError(f"torchvision cannot make {name!r}: {error}") from error
    side = 299 if name == "inception_v3" else 224
    return model.eval(), torch.rand(_BATCH, 3, side, side)


def from_transformers(name: str, options: Mapping[str, Any], *, weights: bool = True) -> Made:
    """A class name of transformers makes a small random model; anything else is a trained model, by folder or hub name.

    Options are fields of the configuration. weights=False reads the configuration alone (its file will do, too).
    """
    transformers = library("transformers")
    model_class = None if Path(name).exists() else _attribute(transformers, name)
    is_class = inspect.isclass(model_class)
    model = _small(model_class, options) if is_class else _trained(transformers, name, options, weights)
    return model.eval(), _dummy_inputs(model)


def _attribute(transformers: ModuleType, name: str) -> Any:
    try:
        return getattr(transformers, name, None)
    except ImportError as error:  # its modules are imported when they are asked for
        raise RequestError(f"transformers cannot import {name}: {error.__cause__ or error}") from error


def _small(model_class: Any, options: Mapping[str, Any]) -> nn.Module:
    config_class = getattr(model_class, "config_class", None)
    if config_class is None:
        raise RequestError(f"hf:{model_class.__name__} names no architecture, such as hf:BertForSequenceClassification")
    default = config_class()
    unknown = [key for key in options if not hasattr(default, key)]
    if unknown:
        raise RequestError(f"{config_class.__name__} has no field {', '.join(unknown)}")
    small = {key: value for key, value in _SMALL.items() if hasattr(default, key)}
    config = config_class(**{**small, **options})
    config.use_cache = False
    return model_class(config)


def _trained(transformers: ModuleType, name: str, options: Mapping[str, Any], weights: bool) -> nn.Module:
    try:
        config = transformers.AutoConfig.from_pretrained(name, use_cache=False, **options)
        model_class = _attribute(transformers, (config.architectures or ["AutoModel"])[0])
        return model_class.from_pretrained(name, config=config) if weights else model_class(config)
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"transformers cannot load hf:{name}: {reason}") from error


def _dummy_inputs(model: Any) -> dict[str, Tensor]:
    """Keyword inputs of the kind the model's main input names: pixels, audio features or token ids."""
    config = model.config
    tokens = torch.randint(1, getattr(config, "vocab_size", 2), (_BATCH, _TOKENS))
    if model.main_input_name == "pixel_values":
        side = config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        return {"pixel_values": torch.rand(_BATCH, config.num_channels, height, width)}
    if model.main_input_name == "input_features":
        features = torch.rand(_BATCH, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": features, "decoder_input_ids": tokens}
    return {"input_ids": tokens}
