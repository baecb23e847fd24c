"""Builds every model of the list, randomly initialised, with example inputs. `SOURCE:NAME`, one a line."""

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, Any]

MODELS = """
torchvision:resnet18 torchvision:resnet50 torchvision:vgg16_bn torchvision:alexnet torchvision:mobilenet_v2
torchvision:mobilenet_v3_large torchvision:efficientnet_b0 torchvision:densenet121 torchvision:googlenet
torchvision:inception_v3 torchvision:regnet_y_400mf torchvision:resnext50_32x4d torchvision:convnext_tiny
torchvision:vit_b_16 torchvision:swin_t torchvision:maxvit_t torchvision:shufflenet_v2_x1_0
torchvision:squeezenet1_1 torchvision:mnasnet1_0
timm:resnet50 timm:seresnet50 timm:convnextv2_atto timm:vit_tiny_patch16_224 timm:deit_tiny_distilled_patch16_224
timm:beit_base_patch16_224 timm:swin_tiny_patch4_window7_224 timm:swinv2_tiny_window8_256 timm:mixer_s32_224
timm:resmlp_12_224 timm:gmlp_s16_224 timm:coat_lite_tiny timm:cait_xxs24_224 timm:levit_128s
timm:xcit_nano_12_p16_224 timm:poolformer_s12 timm:hrnet_w18_small timm:dla34 timm:res2net50_14w_8s timm:mobilevit_s
timm:eva02_tiny_patch14_224 timm:gcvit_xxtiny timm:edgenext_xx_small timm:tiny_vit_5m_224 timm:fastvit_t8
timm:repvgg_a0 timm:cspresnet50 timm:ghostnet_100 timm:nest_tiny timm:pvt_v2_b0 timm:twins_svt_small
timm:volo_d1_224 timm:efficientformer_l1 timm:dm_nfnet_f0 timm:hiera_tiny_224 timm:dpn68 timm:rexnet_100
timm:mobilenetv3_small_100 timm:mobilenetv4_conv_small timm:regnety_004
hf:BertForSequenceClassification hf:DistilBertForSequenceClassification hf:RobertaForSequenceClassification
hf:GPT2LMHeadModel hf:LlamaForCausalLM hf:T5EncoderModel hf:ViTForImageClassification hf:WhisperModel
hf:OPTForCausalLM hf:Qwen3ForCausalLM hf:MistralForCausalLM
""".split()


def build(name: str) -> Built:
    """(model in eval mode, example inputs) of `SOURCE:NAME`."""
    source, _, kind = name.partition(":")
    torch.manual_seed(0)
    model, inputs = {"torchvision": _torchvision, "timm": _timm, "hf": _hf}[source](kind)
    return model.eval(), inputs


def _torchvision(name: str) -> Built:
    # A CPU-only torch cannot load torchvision's compiled operators; its models need none of them.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    import torchvision

    extra: dict[str, Any] = {"aux_logits": False} if name in {"googlenet", "inception_v3"} else {}
    if extra:
        extra["init_weights"] = False
    model = torchvision.models.get_model(name, weights=None, **extra)
    return model, torch.randn(2, 3, 299 if name == "inception_v3" else 224, 299 if name == "inception_v3" else 224)


def _timm(name: str) -> Built:
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
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
