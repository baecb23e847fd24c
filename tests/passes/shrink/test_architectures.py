"""Small configurations of transformers whose axes are hard to find: grouped queries, shared layers, experts, Conv1D."""

import sys
import types
from typing import Any

import pytest
import torch
from cases import halved

import dyncompress as dc
from dyncompress.passes.graph.cost import count_macs

# A CPU-only torch cannot load torchvision's compiled operators, which transformers may look for.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
tr = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "use_cache": False}
MODELS: dict[str, Any] = {
    "grouped queries": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**GROUPED)),
    "reused layers": lambda: tr.AlbertForSequenceClassification(tr.AlbertConfig(**SMALL, embedding_size=32)),
    "experts": lambda: tr.MixtralForCausalLM(tr.MixtralConfig(**GROUPED, num_local_experts=4)),
    "Conv1D, tied": lambda: tr.GPT2LMHeadModel(
        tr.GPT2Config(
            vocab_size=120, n_embd=64, n_layer=2, n_head=4, use_cache=False, bos_token_id=1, eos_token_id=2,
            n_positions=64,
        )
    ),
}  # fmt: skip
KINDS = {
    "grouped queries": {"heads": 4, "head dims": 3, "neurons": 2, "residual width": 1, "branch": 4},
    "reused layers": {"heads": 1, "head dims": 2, "neurons": 3, "embedding columns": 1},
    "experts": {"heads": 4, "head dims": 3, "neurons": 2, "residual width": 1, "branch": 2},
    "Conv1D, tied": {"heads": 2, "head dims": 4, "neurons": 2, "residual width": 1, "branch": 4},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_real_axes_are_found_and_shrink(name: str) -> None:
    torch.manual_seed(0)
    gm = dc.capture(MODELS[name]().eval(), {"input_ids": torch.randint(3, 120, (2, 9))})
    small = halved(gm, KINDS[name])
    assert count_macs(small) < 0.4 * count_macs(gm)
    assert sum(p.numel() for p in small.parameters()) < 0.4 * sum(p.numel() for p in gm.parameters())


def test_the_experts_a_token_does_not_visit_cost_nothing() -> None:
    macs = {}
    for chosen in (1, 3):
        config = tr.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=chosen)
        gm = dc.capture(tr.MixtralForCausalLM(config).eval(), {"input_ids": torch.randint(3, 120, (2, 9))})
        macs[chosen] = count_macs(gm)
    assert macs[3] - macs[1] == 2 * 2 * 9 * 3 * 64 * 128  # experts, layers, tokens, three weights of 64 x 128
