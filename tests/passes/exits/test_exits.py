"""Exits: where they go, what they read, what the graph looks like afterwards."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from cases import CASES, call, graph, graph_with_exits, logits_of, model
from nets import TwoConvs, Vgg
from torch import Tensor, fx, nn

from dyncompress.errors import RequestError
from dyncompress.passes.capture.capture import capture
from dyncompress.passes.edit.outputs import find_logits
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.passes.graph.cost import count_macs, count_parameters
from dyncompress.passes.graph.meta import exits_of
from dyncompress.passes.modules.exit_heads import HEADS, ImageHead, TokenHead, VectorHead
from dyncompress.passes.rewrites.unstack_recurrent import UnstackRecurrent


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def heads(gm: fx.GraphModule) -> list[nn.Module]:
    return list(gm.exits.children())


def test_the_graph_before_and_after() -> None:
    gm = capture(TwoConvs(), torch.randn(1, 1, 8, 8))
    before = gm.code
    new = InsertExits(1)(gm)
    assert gm.code == before and not exits_of(gm) and not hasattr(gm, "exits")
    expected = """\
def forward(self, x):
    x, = fx_pytree.tree_flatten_spec(([x], {}), self._in_spec)
    conv = self.conv(x);  x = None
    relu = torch.ops.aten.relu.default(conv);  conv = None
    exits_0 = getattr(self.exits, "0")(relu)
    mid = self.mid(relu);  relu = None
    relu_1 = torch.ops.aten.relu.default(mid);  mid = None
    mean = torch.ops.aten.mean.dim(relu_1, [2, 3]);  relu_1 = None
    fc = self.fc(mean);  mean = None
    return (exits_0, fc)"""
    assert new.gm.code.strip() == expected
    assert new.modified and exits_of(new.gm) == ("relu",)
    new.gm.graph.lint()


@pytest.mark.parametrize("name", CASES)
def test_the_last_output_is_the_models_own(name: str) -> None:
    batch = CASES[name].batch(5)
    outputs = call(graph_with_exits(name), batch)
    wanted = logits_of(call(model(name), batch))
    assert type(outputs) is tuple and len(outputs) == CASES[name].exits + 1
    assert all(z.shape == wanted.shape for z in outputs)
    torch.testing.assert_close(outputs[-1], logits_of(call(graph(name), batch)), rtol=0, atol=0)
    torch.testing.assert_close(outputs[-1], wanted)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("resnet", ["relu_2", "relu_4", "relu_6"]),
        ("vgg", ["max_pool2d", "max_pool2d_1"]),
        ("channels-last", ["add", "add_1"]),
        ("vit", ["add_2", "add_4", "add_6"]),
        ("text", ["add_2", "add_4"]),
    ],
)
def test_exits_follow_whole_blocks_at_equal_shares(name: str, at: list[str]) -> None:
    gm = graph_with_exits(name)
    assert exits_of(gm) == tuple(at)
    report = InsertExits(CASES[name].exits)(graph(name)).report
    assert [e.at for e in report.exits] == at and report.macs == count_macs(graph(name))


@pytest.mark.parametrize(
    ("name", "kind", "arguments"),
    [
        ("resnet", ImageHead, [(8, 10, 1, 4), (16, 10, 1, 2), (16, 10, 1, 2)]),
        ("vgg", ImageHead, [(8, 10, 1, 2), (16, 10, 1, 2)]),
        ("channels-last", ImageHead, [(16, 10, 3, 1), (16, 10, 3, 1)]),
        ("vit", TokenHead, [(32, 10, "first")] * 3),
        ("text", TokenHead, [(32, 4, "mean")] * 2),
        ("lstm", TokenHead, [(24, 5, "last")] * 2),
        ("two-inputs", VectorHead, [(12, 3)] * 2),
    ],
)
def test_heads_fit_what_they_read(name: str, kind: type[nn.Module], arguments: list[tuple[object, ...]]) -> None:
    gm = graph_with_exits(name)
    assert all(type(h) is kind for h in heads(gm))
    assert [tuple(h.spec()["args"].values()) for h in heads(gm)] == arguments
    assert sum(h.macs_per_sample for h in heads(gm)) < 0.02 * count_macs(graph(name)) or name == "two-inputs"


def test_a_map_is_read_before_it_is_flattened() -> None:
    gm = InsertExits(("max_pool2d_2",))(graph("vgg")).gm
    assert type(heads(gm)[0]) is ImageHead and heads(gm)[0].channels == 32
    last = InsertExits(3)(capture(Vgg(hidden=512), torch.randn(1, 3, 16, 16))).report.exits[-1]
    assert last.at == "max_pool2d_2"


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("grid", [1, 2])
def test_image_head_formula(dim: int, grid: int) -> None:
    x = torch.randn(3, 6, 4, 8)
    head = ImageHead(x.shape[dim], 6, dim, grid)
    nn.init.constant_(head.mix, 0.7)
    a = 1 / (1 + np.exp(-0.7))
    data = np.moveaxis(x.numpy(), dim, 1)
    h, w = data.shape[2] // grid, data.shape[3] // grid
    cells = [
        a * (cell := data[:, c, i * h : i * h + h, j * w : j * w + w].reshape(3, -1)).max(1) + (1 - a) * cell.mean(1)
        for c in range(data.shape[1])
        for i in range(grid)
        for j in range(grid)
    ]
    wanted = np.stack(cells, 1) @ head.linear.weight.detach().numpy().T + head.linear.bias.detach().numpy()
    np.testing.assert_allclose(head(x).detach().numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_image_head_pools_any_number_of_dims() -> None:
    x = torch.randn(2, 5, 3, 4, 6)
    head = ImageHead(6, 3, 4)
    pooled = (x.amax((1, 2, 3)) + x.mean((1, 2, 3))) / 2
    torch.testing.assert_close(head(x), head.linear(pooled))


@pytest.mark.parametrize(("token", "pick"), [("first", 0), ("last", -1), ("mean", None)])
def test_token_head_reads_its_token(token: str, pick: int | None) -> None:
    head, x = TokenHead(6, 3, token), torch.randn(2, 5, 6)
    read = x.numpy().mean(1) if pick is None else x.numpy()[:, pick]
    normed = (read - read.mean(-1, keepdims=True)) / np.sqrt(read.var(-1, keepdims=True) + 1e-5)
    wanted = normed @ head.linear.weight.detach().numpy().T + head.linear.bias.detach().numpy()
    np.testing.assert_allclose(head(x).detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_head_is_rebuilt_from_its_spec(name: str) -> None:
    for head in heads(graph_with_exits(name)):
        spec = head.spec()
        rebuilt = HEADS[spec["type"]](**spec["args"])
        rebuilt.load_state_dict(head.state_dict())
        assert rebuilt.spec() == spec and str(rebuilt) == str(head)


def test_exits_by_name() -> None:
    gm = InsertExits(("relu_6", "relu_2"))(graph("resnet")).gm
    assert exits_of(gm) == ("relu_2", "relu_6")
    assert str(InsertExits(("relu_2",))) == "insert-exits: {exits: [relu_2], head: auto}"
    assert str(InsertExits()) == "insert-exits: {exits: 3, head: auto}"
    assert InsertExits(["relu_2"]) == InsertExits(("relu_2",))  # as a recipe gives it


class Stacked(nn.Module):
    def __init__(self, layer: nn.RNNBase, read: str) -> None:
        super().__init__()
        self.rnn, self.read = layer, read
        width = layer.proj_size or layer.hidden_size
        self.fc = nn.Linear(width * (2 if read == "sequence" and layer.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.rnn(x)
        if self.read == "sequence":
            return self.fc(y[:, -1])
        hidden, other = state if isinstance(state, tuple) else (state, state)
        if self.read == "whole":
            return self.fc(hidden.mean(0))
        return self.fc(hidden[-1]) + (
            self.fc(hidden[0]) * other[-2].mean(-1, keepdim=True) if self.read == "all" else 0
        )


STACKS = {
    "lstm": lambda: nn.LSTM(6, 10, 3, batch_first=True, dropout=0.3),
    "bi-gru": lambda: nn.GRU(6, 10, 2, batch_first=True, bidirectional=True, bias=False),
    "bi-lstm-proj": lambda: nn.LSTM(6, 10, 2, batch_first=True, bidirectional=True, proj_size=4),
    "rnn": lambda: nn.RNN(6, 10, 2, nonlinearity="relu", batch_first=True),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("read", ["sequence", "last", "all"])
@pytest.mark.parametrize("layer", STACKS)
def test_recurrent_stacks_become_their_layers(layer: str, read: str) -> None:
    source, x = Stacked(STACKS[layer](), read).eval(), torch.randn(4, 5, 6)
    gm = capture(source, x)
    names = sum(p.numel() for p in gm.parameters())
    made = UnstackRecurrent()(gm)
    assert made.report.paths == ("rnn",) and made.modified
    gm = made.gm
    gm.graph.lint()
    torch.testing.assert_close(gm(x), source(x))
    assert sum(p.numel() for p in gm.parameters()) == names
    assert [type(m) for m in gm.rnn.children()][:2] == [type(source.rnn)] * 2
    if read != "all":
        new = InsertExits(1)(capture(source, x))
        assert new.report.unstacked == ("rnn",) and heads(new.gm)[0].token == "last"
        torch.testing.assert_close(new.gm(x)[-1], source(x))


def test_a_stack_whose_states_are_read_whole_stays() -> None:
    gm = capture(Stacked(STACKS["rnn"](), "whole"), torch.randn(4, 5, 6))
    with pytest.raises(RequestError, match="exits=1: the model has no place for an exit"):
        InsertExits(1)(gm)


def test_gradients_reach_every_head_and_the_trunk() -> None:
    for name in CASES:
        gm = InsertExits(CASES[name].exits)(graph(name)).gm.train()
        sum(z.square().sum() for z in call(gm, CASES[name].batch(4))).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for h in heads(gm) for p in h.parameters()), name


def test_what_only_other_outputs_need_goes() -> None:
    class Two(TwoConvs):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Conv2d(4, 7, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x), "map": self.other(self.conv(x))}

    gm = capture(Two(), torch.randn(1, 1, 8, 8))
    new = InsertExits(1)(gm).gm
    assert hasattr(gm, "other") and not hasattr(new, "other")
    assert count_parameters(new) == count_parameters(gm) - 35 + count_parameters(new.exits)


# --- outputs -----------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    hidden: Tensor
    logits: Tensor


class Shaped(nn.Module):
    def __init__(self, shape: str) -> None:
        super().__init__()
        self.a, self.b, self.fc, self.shape = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3), shape

    def forward(self, x: Tensor) -> object:
        hidden = torch.relu(self.a(x))
        z = self.fc(torch.relu(self.b(hidden)))
        outputs = {
            "tuple": (hidden.unflatten(1, (2, 3)), z, z.argmax(1)),
            "named": Output(hidden, z),
            "two": (hidden, z),
            "map": z[:, :, None, None],
            "one": z[:, :1],
        }
        return outputs[self.shape]


@pytest.mark.parametrize("shape", ["tuple", "named"])
def test_logits_are_found_among_other_outputs(shape: str) -> None:
    assert find_logits(capture(Shaped(shape), torch.randn(2, 6))).name == "fc"


@pytest.mark.parametrize("shape", ["two", "map", "one"])
def test_outputs_without_clear_logits_are_refused(shape: str) -> None:
    with pytest.raises(RequestError, match=r"exits need one \(batch, classes\) logits output .* 'logits'"):
        InsertExits(1)(capture(Shaped(shape), torch.randn(2, 6)))


# --- requests that cannot be met ---------------------------------------------------------------------------------


def test_too_many_exits() -> None:
    with pytest.raises(RequestError, match=r"exits=9: the model has room for 3 \(relu, relu_1, mul\); ask for fewer"):
        InsertExits(9)(graph("two-inputs"))


def test_unknown_node_names() -> None:
    with pytest.raises(RequestError, match=r"no exit can follow nowhere, late; the model's places are: .*relu"):
        InsertExits(("relu", "nowhere", "late"))(graph("two-inputs"))


@pytest.mark.parametrize("exits", [0, -1, ()])
def test_no_exits_at_all(exits: int | tuple[str, ...]) -> None:
    with pytest.raises(RequestError, match="give a number of at least 1"):
        InsertExits(exits)


def test_exits_twice() -> None:
    with pytest.raises(RequestError, match="insert all exits in one pass"):
        InsertExits(1)(graph_with_exits("resnet"))
