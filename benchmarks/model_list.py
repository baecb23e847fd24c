"""Builds every model of models.txt (`SOURCE:NAME`, one a line), randomly initialised, with example inputs."""

from collections.abc import Callable
from typing import Any

import torch
from common import HERE, QUICK, without_compiled_operators
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dyncompress.passes.graph.inputs import Inputs, split_inputs

Built = tuple[nn.Module, Any]

NEEDS = ("torchvision", "timm", "transformers")
MODELS = ["hf:BertForSequenceClassification"] if QUICK else (HERE / "models.txt").read_text().split()


def build(name: str) -> Built:
    """(model in eval mode, example inputs) of `SOURCE:NAME`.

    Parameters that start at zero (heads, last norms of a branch) get small random values, or outputs would be constant.
    """
    without_compiled_operators()
    source, _, kind = name.partition(":")
    torch.manual_seed(0)
    model, inputs = {"torchvision": _torchvision, "timm": _timm, "hf": _hf}[source](kind)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval(), inputs


def _torchvision(name: str) -> Built:
    import torchvision

    extra = {"aux_logits": False, "init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    size = 299 if name == "inception_v3" else 224
    return torchvision.models.get_model(name, weights=None, **extra), torch.randn(2, 3, size, size)


def _timm(name: str) -> Built:
    import timm

    model = timm.create_model(name, pretrained=False)
    return model, torch.randn(2, *model.default_cfg["input_size"])


def _tokens(length: int = 17) -> Tensor:
    return torch.randint(3, _WORDS, (2, length))


def _ids() -> Inputs:
    return {"input_ids": _tokens()}


def _masked_ids() -> Inputs:
    return {"input_ids": (ids := _tokens()), "attention_mask": torch.ones_like(ids)}


_WORDS = 120
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_BERT = {**_SMALL, "vocab_size": _WORDS}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "use_cache": False}
_WHISPER = {
    "vocab_size": _WORDS, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_mel_bins": 16,
    "max_source_positions": 40, "max_target_positions": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "use_cache": False,
}  # fmt: skip
_OPT = {
    "vocab_size": _WORDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128,
    "word_embed_proj_dim": 64, "use_cache": False,
}  # fmt: skip
# class -> (configuration, its options, inputs)
_HF: dict[str, tuple[str, dict[str, Any], Callable[[], Inputs]]] = {
    "BertForSequenceClassification": ("BertConfig", _BERT, _masked_ids),
    "DistilBertForSequenceClassification": ("DistilBertConfig",
        {"vocab_size": _WORDS, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}, _masked_ids),
    "RobertaForSequenceClassification": ("RobertaConfig", _BERT, _masked_ids),
    "GPT2LMHeadModel": ("GPT2Config",
        {"vocab_size": _WORDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "use_cache": False}, _ids),
    "LlamaForCausalLM": ("LlamaConfig", _LLAMA, _ids),
    "T5EncoderModel": ("T5Config",
        {"vocab_size": _WORDS, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}, _ids),
    "ViTForImageClassification": ("ViTConfig", {**_SMALL, "image_size": 32, "patch_size": 8},
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}),
    "WhisperModel": ("WhisperConfig", _WHISPER,
        lambda: {"input_features": torch.randn(2, 16, 80), "decoder_input_ids": _tokens(7)}),
    "OPTForCausalLM": ("OPTConfig", _OPT, _masked_ids),
    "Qwen3ForCausalLM": ("Qwen3Config", {**_LLAMA, "head_dim": 16}, _ids),
    "MistralForCausalLM": ("MistralConfig", _LLAMA, _ids),
}  # fmt: skip


def _hf(name: str) -> Built:
    import transformers

    config, options, inputs = _HF[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    return model, inputs()


# --- what a model returns --------------------------------------------------------------------------------------------


def tensors(output: Any) -> list[Tensor]:
    """The tensors of any output, in order."""
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors that `model` returns."""
    args, kwargs = split_inputs(inputs)
    with torch.no_grad():
        return tensors(model(*args, **kwargs))


def gap(a: Any, b: Any) -> float:
    """The largest difference between the tensors of two outputs."""
    return max(float((x - y).abs().max()) for x, y in zip(tensors(a), tensors(b), strict=True))
