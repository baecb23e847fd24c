"""Builds every model of models.txt (`SOURCE:NAME`, one a line), randomly initialised, with example inputs."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, Any]

MODELS = (Path(__file__).parent / "models.txt").read_text().split()


def build(name: str) -> Built:
    """(model in eval mode, example inputs) of `SOURCE:NAME`.

    Parameters that start at zero (heads, last norms of a branch) get small random values, or outputs would be constant.
    """
    # A CPU-only torch cannot load torchvision's compiled operators; the models need none of them.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    source, _, kind = name.partition(":")
    torch.manual_seed(0)
    model, inputs = {"torchvision": _torchvision, "timm": _timm, "hf": _hf}[source](kind)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval(), inputs


def _torchvision(name: str) -> Built:
    import torchvision

    extra: dict[str, Any] = {"aux_logits": False} if name in {"googlenet", "inception_v3"} else {}
    if extra:
        extra["init_weights"] = False
    model = torchvision.models.get_model(name, weights=None, **extra)
    return model, torch.randn(2, 3, 299 if name == "inception_v3" else 224, 299 if name == "inception_v3" else 224)


def _timm(name: str) -> Built:
    import timm

    model = timm.create_model(name, pretrained=False)
    return model, torch.randn(2, *model.default_cfg["input_size"])


def _tokens(vocabulary: int, mask: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, vocabulary, (2, 17))
    return {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if mask else {})


def _hf(name: str) -> Built:
    import transformers as tr

    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    bert = {**small, "vocab_size": 120}
    llama = {**bert, "num_key_value_heads": 2, "use_cache": False}
    whisper = {
        "vocab_size": 120, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_mel_bins": 16,
        "max_source_positions": 40, "max_target_positions": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1, "use_cache": False,
    }  # fmt: skip
    builders: dict[str, Callable[[], Built]] = {
        "BertForSequenceClassification": lambda: (
            tr.BertForSequenceClassification(tr.BertConfig(**bert)), _tokens(120, mask=True)),
        "DistilBertForSequenceClassification": lambda: (
            tr.DistilBertForSequenceClassification(
                tr.DistilBertConfig(vocab_size=120, dim=64, n_layers=2, n_heads=4, hidden_dim=128)),
            _tokens(120, mask=True)),
        "RobertaForSequenceClassification": lambda: (
            tr.RobertaForSequenceClassification(tr.RobertaConfig(**bert)), _tokens(120, mask=True)),
        "GPT2LMHeadModel": lambda: (
            tr.GPT2LMHeadModel(tr.GPT2Config(vocab_size=120, n_embd=64, n_layer=2, n_head=4, use_cache=False)),
            _tokens(120)),
        "LlamaForCausalLM": lambda: (tr.LlamaForCausalLM(tr.LlamaConfig(**llama)), _tokens(120)),
        "T5EncoderModel": lambda: (
            tr.T5EncoderModel(tr.T5Config(vocab_size=120, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)),
            _tokens(120)),
        "ViTForImageClassification": lambda: (
            tr.ViTForImageClassification(tr.ViTConfig(**small, image_size=32, patch_size=8)),
            {"pixel_values": torch.randn(2, 3, 32, 32)}),
        "WhisperModel": lambda: (
            tr.WhisperModel(tr.WhisperConfig(**whisper)),
            {"input_features": torch.randn(2, 16, 80), "decoder_input_ids": torch.randint(3, 120, (2, 7))}),
        "OPTForCausalLM": lambda: (
            tr.OPTForCausalLM(
                tr.OPTConfig(vocab_size=120, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
                             word_embed_proj_dim=64, use_cache=False)),
            _tokens(120, mask=True)),
        "Qwen3ForCausalLM": lambda: (tr.Qwen3ForCausalLM(tr.Qwen3Config(**llama, head_dim=16)), _tokens(120)),
        "MistralForCausalLM": lambda: (tr.MistralForCausalLM(tr.MistralConfig(**llama)), _tokens(120)),
    }  # fmt: skip
    return builders[name]()
