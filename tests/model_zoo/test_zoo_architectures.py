"""The reference architectures: each against its published form, and each halved axis by axis against the masked one."""

from typing import Any

import pytest
import torch
from cases import halved
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompress as dc
from dyncompress.errors import RequestError
from dyncompress.model_zoo import ZOO, build, example_input, load
from dyncompress.model_zoo.networks.encoder import TextEncoder
from dyncompress.model_zoo.networks.language import LSTMLanguageModel, RecurrentHighway
from dyncompress.model_zoo.networks.msdnet import MSDNet
from dyncompress.model_zoo.networks.reader import AttentionFlow, BiDAF
from dyncompress.model_zoo.networks.resnet import ResNetCifar
from dyncompress.model_zoo.networks.transformer import EncoderBlock

WORDS = {"vocabulary": 30}
SMALL: dict[str, dict[str, Any]] = {
    "msdnet-cifar": {"exits": 3, "base": 3, "step": 1},
    "lstm-lm": WORDS | {"width": 12, "hidden": 16},
    "rhn-lm": WORDS | {"width": 12, "hidden": 16, "depth": 3},
    "bidaf": WORDS | {"width": 8, "hidden": 6},
    "text-encoder": WORDS | {"width": 32, "depth": 2, "hidden": 48, "positions": 20},
}
DEEP = [f"resnet{depth}-cifar" for depth in (32, 38, 56, 74, 110)]  # resnet20-cifar, only longer
KINDS: dict[str, dict[str, int]] = {
    "lenet": {"channels": 2, "neurons": 2},
    "alexnet-cifar": {"channels": 5, "neurons": 2},
    "vgg-cifar": {"channels": 8},
    "resnet20-cifar": {"channels": 9, "residual width": 3, "branch": 9},
    "msdnet-cifar": {"channels": 50},
    "lstm-lm": {"embedding columns": 1, "hidden states": 2},
    "rhn-lm": {"embedding columns": 1, "hidden states": 1},
    "bidaf": {"embedding columns": 1, "hidden states": 8},
    "text-encoder": {"heads": 2, "head dims": 4, "neurons": 2, "residual width": 1, "branch": 4},
}


def drawn(model: nn.Module) -> nn.Module:
    """The model in eval mode with no parameter or statistic left at zero or one."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1:
            nn.init.uniform_(tensor, 0.3, 0.9)
    return model.eval()


@pytest.mark.parametrize("name", [name for name in ZOO if not ZOO[name].trained and name not in DEEP])
def test_halving_every_axis_equals_masking_it(name: str) -> None:
    torch.manual_seed(0)
    gm = dc.capture(drawn(build(name, **SMALL.get(name, {}))), example_input(name))
    small = halved(gm, KINDS[name])
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in gm.parameters())


@pytest.mark.parametrize(
    ("name", "length"), [("lstm-lm", (9,)), ("text-encoder", (9,)), ("bidaf", (9, 11))], ids=lambda value: str(value)
)
def test_captured_text_models_take_any_length(name: str, length: tuple[int, ...]) -> None:
    model = drawn(build(name, **SMALL[name]))
    gm = dc.capture(model, example_input(name))
    ids = [torch.randint(0, 30, (3, n)) for n in length]
    torch.testing.assert_close(gm(*ids), model(*ids))


# --- by name --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alexnet", "resnet20"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    for function in (build, load, example_input):
        with pytest.raises(
            RequestError,
            match=r"vgg-digits, resnet-digits, .*, lenet, .*, resnet110-cifar",
        ):
            function(name)


def test_what_is_not_trained_is_not_loaded() -> None:
    with pytest.raises(RequestError, match="resnet20-cifar comes without trained weights"):
        load("resnet20-cifar")


def test_options_that_do_not_fit_are_refused() -> None:
    assert build("lstm-lm", vocabulary=77)(example_input("lstm-lm")).shape == (2, 16, 77)
    for name, options, message in [
        ("lenet", {"width": 3}, "lenet cannot be built.*'width'"),
        ("resnet20-cifar", {"depth": 21}, "6 n . 2 layers.*not 21"),
        ("lstm-lm", {"vocabulary": -3}, "lstm-lm cannot be built"),
        ("lstm-lm", {"tied": True, "width": 3}, "width .3. and hidden .200. to agree"),
        ("text-encoder", {"width": 30}, "30 cannot be divided among 4 heads"),
        ("msdnet-cifar", {"exits": 1, "base": 2}, "give 2 layers for 3 scales"),
    ]:
        with pytest.raises(RequestError, match=message):
            build(name, **options)


# --- against the papers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (56, 0.85), (110, 1.7)])
def test_residual_networks_have_their_layers_and_parameters(depth: int, millions: float) -> None:
    model = ResNetCifar(depth)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) or getattr(m, "kernel_size", None) == (3, 3)]
    assert len(layers) == depth
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.025)


def test_a_recurrent_highway_is_its_equations() -> None:
    torch.manual_seed(0)
    layer, x = RecurrentHighway(5, 4, depth=3), torch.randn(2, 6, 5)
    w_h, w_t = layer.input.weight.chunk(2)
    s = torch.zeros(2, 4)
    for t in range(6):
        for index, recurrent in enumerate(layer.layers):
            r_h, r_t = recurrent.weight.chunk(2)
            b_h, b_t = recurrent.bias.chunk(2)
            seen = x[:, t] if index == 0 else torch.zeros(2, 5)
            h = torch.tanh(seen @ w_h.T + s @ r_h.T + b_h)
            gate = torch.sigmoid(seen @ w_t.T + s @ r_t.T + b_t)
            s = h * gate + s * (1 - gate)
        torch.testing.assert_close(layer(x)[:, t], s)


def test_tied_weights_are_one_tensor() -> None:
    tied, untied = (LSTMLanguageModel(50, 8, 8, tied=tied) for tied in (True, False))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert sizes[1] - sizes[0] == 50 * 8 and tied.decoder.weight is tied.embedding.weight


def test_attention_flow_is_the_papers_loop_and_ignores_padding() -> None:
    torch.manual_seed(0)
    layer, h, u = AttentionFlow(4).requires_grad_(False), torch.randn(1, 5, 4), torch.randn(1, 3, 4)
    w = torch.cat((layer.of_context.weight[0], layer.of_question.weight[0], layer.of_both))
    s = torch.tensor([[float(w @ torch.cat((a, b, a * b))) for b in u[0]] for a in h[0]]) + layer.of_context.bias
    to_question = torch.stack([sum(p * b for p, b in zip(row.softmax(0), u[0], strict=True)) for row in s])
    to_context = s.max(1).values.softmax(0) @ h[0]
    expected = torch.cat((h[0], to_question, h[0] * to_question, h[0] * to_context), dim=1)

    def padded(x: Tensor, length: int) -> tuple[Tensor, Tensor]:
        return F.pad(x, (0, 0, 0, length), value=9.0), torch.tensor([[False] * x.shape[1] + [True] * length])

    (h_padded, no_context), (u_padded, no_question) = padded(h, 2), padded(u, 4)
    found = layer(h_padded, u_padded, no_context, no_question)[0, :5]
    torch.testing.assert_close(found, expected)


def test_a_reader_answers_within_the_context() -> None:
    torch.manual_seed(0)
    context = torch.tensor([[3, 4, 5, 0, 0]])
    answer = BiDAF(**SMALL["bidaf"]).eval()(context, torch.tensor([[3, 4, 0]])).softmax(-1)
    assert answer.shape == (1, 2, 5)
    assert answer[..., 3:].max() < 1e-6 < 0.01 < answer[..., :3].min()


@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_block_is_pytorchs(norm_first: bool) -> None:
    torch.manual_seed(0)
    mine = EncoderBlock(8, 2, 12, norm_first)
    theirs = nn.TransformerEncoderLayer(8, 2, 12, 0.0, F.gelu, batch_first=True, norm_first=norm_first)
    names = {"attention.qkv.": "self_attn.in_proj_", "attention.proj.": "self_attn.out_proj."}
    names |= {"mlp.0.": "linear1.", "mlp.2.": "linear2.", "norm1.": "norm1.", "norm2.": "norm2."}
    state = mine.state_dict()
    theirs.load_state_dict({new + k: state[old + k] for old, new in names.items() for k in ("weight", "bias")})
    x, seen = torch.randn(3, 5, 8), torch.arange(5) < torch.tensor([[5], [4], [2]])
    expected = theirs(x, src_key_padding_mask=~seen)
    torch.testing.assert_close(mine(x, seen[:, None, None])[seen], expected[seen])


@pytest.mark.parametrize("norm_first", [True, False])
def test_padding_changes_no_answer(norm_first: bool) -> None:
    model = drawn(TextEncoder(**SMALL["text-encoder"], norm_first=norm_first))
    ids = torch.randint(1, 30, (2, 7))
    torch.testing.assert_close(model(F.pad(ids, (0, 6))), model(ids))


def test_scales_are_dense_and_dropped_in_thirds() -> None:
    """Channels by hand: width 16, 32, 64 and growth 6, 12, 24; 6 layers, so that layers 3 and 5 drop a scale."""
    model = MSDNet(exits=4, base=3, step=1)
    expected = [[22, 44, 88], [28, 56, 112], [(56 + 12) // 2, (112 + 24) // 2], [46, 92], [(92 + 24) // 2], [82]]
    assert [layer.channels for layer in model.layers] == expected
    shapes: list[list[tuple[int, ...]]] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _i, out: shapes.append([tuple(x.shape[1:]) for x in out]))
    early, last = model(torch.rand(2, 3, 32, 32))
    assert [z.shape for z in (*early, last)] == [(2, 10)] * 4
    sides = [(32, 16, 8), (32, 16, 8), (16, 8), (16, 8), (8,), (8,)]
    assert shapes == [[(c, s, s) for c, s in zip(*pair, strict=True)] for pair in zip(expected, sides, strict=True)]


def test_the_default_has_the_papers_exits() -> None:
    model = MSDNet()
    assert model.exits_after == tuple(2 * (i + 1) for i in range(1, 12)) and len(model.layers) == 24
