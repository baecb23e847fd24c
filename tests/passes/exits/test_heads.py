"""Heads by name: their formulas, their cost, and that they predict, save, load and export like the rest of a model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, call, graph, model
from nets import TwoConvs
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompress as dc
from dyncompress.model_zoo import zoo as models
from dyncompress.passes.exits.head_choice import HEAD_KINDS
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.passes.exits.stages import split_stages
from dyncompress.passes.graph.meta import exits_of
from dyncompress.passes.modules.multi_layer_heads import (
    AttentionHead,
    Cascade,
    Ensemble,
    LinearHead,
    MLPHead,
    PositionHead,
)
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import ExitPolicy

FITTING = [
    ("resnet", "linear"),
    ("resnet", "attention"),
    ("resnet", "cascade"),
    ("channels-last", "attention"),
    ("channels-last", "copy"),
    ("vit", "mlp"),
    ("vit", "copy"),
    ("vit", "linear"),
    ("lstm", "mlp"),
    ("two-inputs", "mlp"),
    ("two-inputs", "cascade"),
    ("text", "cascade"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def with_heads(name: str, kind: str) -> DynamicModel:
    gm = InsertExits(CASES[name].exits, kind)(graph(name)).gm
    for path, parameter in gm.named_parameters():
        if path.startswith("exits.") and path.endswith(("ensemble.weight", "ensemble.bias")):
            nn.init.uniform_(parameter, 0.2, 1.0)  # else an ensemble is its last member
    return DynamicModel(gm.eval())


def half_leave(dynamic: DynamicModel, logits: tuple[Tensor, ...]) -> ExitPolicy:
    return ExitPolicy("max-softmax", tuple(float(z.detach().softmax(-1).amax(-1).median()) for z in logits[:-1]))


@pytest.mark.parametrize(("name", "kind"), FITTING)
def test_who_leaves_gets_the_exits_own_answer(name: str, kind: str, tmp_path: Path) -> None:
    dynamic, batch = with_heads(name, kind), CASES[name].batch(16)
    logits = call(dynamic.all_logits, batch)
    dynamic.policy = half_leave(dynamic, logits)
    out = call(dynamic.predict, batch)
    wanted = torch.stack([logits[k][i] for i, k in enumerate(out.exit_index.tolist())])
    assert 0 < int((out.exit_index == 0).sum()) < 16
    torch.testing.assert_close(out.logits, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[-1], call(DynamicModel(graph_of_auto(name)).all_logits, batch)[-1])
    dc.save(dynamic, tmp_path / "model.safetensors")
    loaded = dc.load(tmp_path / "model.safetensors")
    assert isinstance(loaded, DynamicModel) and loaded.exit_macs == dynamic.exit_macs
    assert torch.equal(call(loaded.predict, batch).logits, out.logits)


def graph_of_auto(name: str) -> torch.fx.GraphModule:
    return InsertExits(CASES[name].exits)(graph(name)).gm.eval()


@pytest.mark.parametrize(("kind", "exits"), [("attention", ("relu",)), ("cascade", ("relu", "relu_1"))])
def test_onnx(kind: str, exits: tuple[str, ...], tmp_path: Path) -> None:
    batch = torch.randn(64, 1, 11, 11)
    dynamic = DynamicModel(InsertExits(exits, kind)(dc.capture(TwoConvs(6, stride=2).eval(), batch[:2])).gm.eval())
    dynamic.policy = half_leave(dynamic, dynamic.all_logits(batch))
    report = dc.export_onnx(dynamic, tmp_path / "model.onnx", inputs=batch)
    assert min(report.exits) > 0


def test_heads_that_do_not_fit_are_refused() -> None:
    for name, kind, message in [
        ("resnet", "mlp", r'head="mlp" reads tokens or vectors; at relu_2 there is \(\'batch\', 8, 16, 16\)'),
        ("vit", "attention", r'head="attention" reads an image .*; at add_2 there is \(\'batch\', 17, 32\)'),
        ("resnet", "copy", r"head='copy': nothing like what relu_2 gives, \('batch', 8, 16, 16\)"),
        ("text", "copy", r"head='copy': the model's own head, after add_6, also reads attention_mask"),
    ]:
        with pytest.raises(dc.RequestError, match=message):
            InsertExits(CASES[name].exits, kind)(graph(name))
    with pytest.raises(dc.RequestError, match=f"head='sum': use one of {', '.join(HEAD_KINDS)}"):
        InsertExits(1, "sum")


# --- formulas ----------------------------------------------------------------------------------------------------


def linear(layer: nn.Linear, x: np.ndarray) -> np.ndarray:
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def normed(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def close(got: Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_linear_head() -> None:
    x = torch.randn(3, 5, 4, 6)
    for dim, axes in ((1, (2, 3)), (3, (1, 2))):
        head = LinearHead(x.shape[dim], 7, dim)
        close(head(x), linear(head.linear, x.numpy().mean(axes)))


@pytest.mark.parametrize(("token", "pick"), [("first", 0), ("last", -1), ("mean", None)])
def test_mlp_head(token: str, pick: int | None) -> None:
    head, x = MLPHead(6, 3, token), torch.randn(2, 5, 6)
    read = x.numpy().mean(1) if pick is None else x.numpy()[:, pick]
    hidden = torch.from_numpy(linear(head.hidden, normed(read)))
    gelu = hidden.numpy() * 0.5 * (1 + torch.erf(hidden / 2**0.5).numpy())
    close(head(x), linear(head.linear, gelu))


def test_position_head_answers_everywhere_alone() -> None:
    head, x = PositionHead(6, 3), torch.randn(2, 5, 6)
    for t in range(5):
        close(head(x)[:, t], linear(head.linear, normed(x[:, t].numpy())))


@pytest.mark.parametrize("size", [8, 7])
def test_attention_head(size: int) -> None:
    head, x = AttentionHead(8, 3, 1).eval(), torch.randn(2, 8, size, size)
    inner = F.relu(head.norm(F.conv2d(x, head.down.weight, stride=2, padding=1)))
    gate = head.gate_norm(F.conv_transpose2d(inner, head.up.weight, stride=2, padding=1))[:, :, :size, :size].sigmoid()
    assert gate.shape == x.shape
    y = x * gate
    for conv, norm in zip(head.bottleneck[::3], head.bottleneck[1::3], strict=True):
        y = F.relu(norm(conv(y)))
    assert y.shape == (2, 8, 4, 4)
    torch.testing.assert_close(head(x), head.linear(y.mean((2, 3))))
    channels_last = AttentionHead(8, 3, 3).eval()
    channels_last.load_state_dict(head.state_dict())
    torch.testing.assert_close(channels_last(x.permute(0, 2, 3, 1)), head(x))


def test_cascade_and_geometric_ensemble() -> None:
    z = [torch.randn(4, 3, requires_grad=True) for _ in range(2)]
    first, second, ensemble = Cascade(3, True), Cascade(3, False), Ensemble(2, 3)
    p0 = z[0].softmax(-1).detach().numpy()
    assert second.linear is not None
    p1 = (z[1] + torch.from_numpy(p0 @ second.linear.weight.detach().numpy().T)).softmax(-1).detach().numpy()
    stack = second(z[1], first(z[0]))
    close(stack.exp(), np.stack([p0, p1], 1))
    torch.testing.assert_close(ensemble(stack).softmax(-1)[:, 0], stack[:, 1].exp()[:, 0])  # at first the last alone
    with torch.no_grad():
        ensemble.weight.copy_(torch.tensor([[0.3], [1.2]]))
        ensemble.bias.copy_(torch.tensor([0.1, -0.2, 0.0]))
    product = p0**0.3 * p1**1.2 * np.exp(np.array([0.1, -0.2, 0.0]))
    close(ensemble(stack).softmax(-1), product / product.sum(1, keepdims=True))
    ensemble(stack)[:, 0].sum().backward()
    assert z[0].grad is None and z[1].grad is not None  # an exit does not train the earlier ones


# --- costs -------------------------------------------------------------------------------------------------------


def head_macs(name: str, kind: str) -> list[int]:
    return [stage.head_macs for stage in split_stages(with_heads(name, kind).trunk)][:-1]


def test_head_macs_by_hand() -> None:
    assert head_macs("vit", "mlp") == [32 * 32 + 32 * 10] * 3
    assert head_macs("vit", "copy") == [32 * 10] * 3
    assert head_macs("resnet", "linear") == [8 * 10, 16 * 10, 16 * 10]
    c, h, inner = 8, 16, 2  # the first exit of the residual network
    down, up = c * (h // 2) ** 2 * c * 9, c * (h // 2) ** 2 * c * 16
    bottleneck = inner * h**2 * c + inner * (h // 2) ** 2 * inner * 9 + c * (h // 2) ** 2 * inner
    assert head_macs("resnet", "attention")[0] == down + up + bottleneck + c * 10


def test_a_cascade_is_paid_for_by_all_who_go_on() -> None:
    plain, cascade = with_heads("two-inputs", "auto"), with_heads("two-inputs", "cascade")
    assert head_macs("two-inputs", "cascade") == [0, 0]
    assert [a - b for a, b in zip(cascade.exit_macs, plain.exit_macs, strict=True)] == [0, 9, 9]
    assert cascade.static_macs == plain.static_macs


# --- copies ------------------------------------------------------------------------------------------------------


def test_a_copied_head_is_the_models_own() -> None:
    gm = InsertExits(3, "copy")(graph("vit")).gm
    copied = gm.get_submodule("exits.1.head")
    assert torch.equal(copied.weight, gm.head.weight) and copied.weight is not gm.head.weight
    source = model("vit")
    x = source.patch(batch := CASES["vit"].batch(4)).flatten(2).transpose(1, 2)
    x = torch.cat([source.cls.expand(4, -1, -1), x], 1) + source.pos
    for k, layer in enumerate(source.layers[:3]):
        x = layer(x)
        torch.testing.assert_close(gm(batch)[k], source.head(source.norm(x)[:, 0]))


# --- positions, every block, a model's own exits --------------------------------------------------------------------


def test_a_language_model_gets_a_head_at_every_position() -> None:
    language = models.build("lstm-lm", vocabulary=50, width=12, hidden=16, layers=3).eval()
    ids = torch.randint(0, 50, (4, 9))
    new = InsertExits(2)(dc.capture(language, ids))
    dynamic = DynamicModel(new.gm.eval())
    logits = dynamic.all_logits(ids[:, :6])  # another length
    assert [tuple(z.shape) for z in logits] == [(4, 6, 50)] * 3
    torch.testing.assert_close(logits[-1], language(ids[:, :6]))
    assert new.report.exits[0].head_macs == 9 * 16 * 50
    again = dynamic.all_logits(torch.cat([ids[:, :3], ids[:, :3]], 1))
    torch.testing.assert_close(again[0][:, :3], logits[0][:, :3])  # no position sees a later one
    with pytest.raises(dc.RequestError, match="at every position: use auto or copy"):
        InsertExits(1, "mlp")(dc.capture(language, ids))


def test_every_block() -> None:
    assert exits_of(InsertExits("every")(graph("vit")).gm) == ("add", *(f"add_{k}" for k in range(1, 8)))
    assert exits_of(InsertExits("every")(graph("resnet")).gm) == ("relu", "relu_2", "relu_4", "relu_6")


def test_own_exits_of_msdnet(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = models.build("msdnet-cifar", exits=4, width=8, growth=4).eval()
    x = torch.rand(12, 3, 32, 32)
    gm = dc.capture(net, x[:2])
    dynamic = DynamicModel(InsertExits("own")(gm).gm.eval())
    early, last = net(x)
    wanted = (*early, last)
    for ours, theirs in zip(dynamic.all_logits(x), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    dynamic.policy = half_leave(dynamic, wanted)
    out = dynamic.predict(x)
    assert len(set(out.exit_index.tolist())) > 2
    rows = torch.stack([wanted[k][i] for i, k in enumerate(out.exit_index.tolist())])
    torch.testing.assert_close(out.logits, rows, rtol=1e-4, atol=1e-5)
    dc.save(dynamic, tmp_path / "net.safetensors")
    loaded = dc.load(tmp_path / "net.safetensors")
    assert isinstance(loaded, DynamicModel) and torch.equal(loaded.predict(x).logits, out.logits)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.first, self.b, self.last = (nn.Linear(5, n) for n in (5, 3, 5, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        return self.first(x), self.last(self.b(torch.relu(x)))


def test_own_exits_need_a_tuple_of_logits() -> None:
    with pytest.raises(dc.RequestError, match='exits="own" needs a model that returns several logits'):
        InsertExits("own")(graph("resnet"))
    pair = dc.capture(Pair(), torch.rand(2, 5))
    assert exits_of(InsertExits("own")(pair).gm) == ("a",)
    with pytest.raises(dc.RequestError, match='exits="own" takes the classifiers of a model that has several'):
        InsertExits(1)(pair)
    with pytest.raises(dc.RequestError, match='give a number, a list of graph nodes, "every" or "own"'):
        InsertExits("some")
