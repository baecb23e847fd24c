"""Memory formats: what is gathered, scattered or shrunk keeps that of what it was made from."""

import pytest
import torch
from cases import CASES, gated_graph, graph
from dynamic_models import Forced
from torch import Tensor

import dyncompress as dc
from dyncompress.compress.training.surgery import operate
from dyncompress.passes.edit.sample_rows import add_rows_, take_rows
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.passes.gates.read_gates import deciding
from dyncompress.passes.graph.copying import deep_copy

LAST = torch.channels_last
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=LAST),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "samples inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "a slice": lambda x: x.repeat(1, 2, 1, 1)[:, :3],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_taken_and_added_in_any_layout(layout: str) -> None:
    plain, rows = torch.randn(6, 3, 4, 5), torch.tensor([4, 0, 5])
    x, added = LAYOUTS[layout](plain.clone()), LAYOUTS[layout](torch.randn(3, 3, 4, 5))
    taken, expected = take_rows(x, rows), plain.index_add(0, rows, added.contiguous())
    assert torch.equal(taken, plain[rows])
    assert add_rows_(x, rows, added) is x and torch.equal(x, expected)
    if layout in ("contiguous", "channels last", "transposed"):
        assert taken.stride() == LAYOUTS[layout](plain[rows]).stride()


def test_gradients_go_through() -> None:
    def gathered_and_put_back(x: Tensor, added: Tensor) -> Tensor:
        x = x.to(memory_format=LAST)
        return add_rows_(x.clone(), rows, added * take_rows(x, rows))

    rows = torch.tensor([3, 1])
    inputs = [torch.randn(n, 2, 3, 3, dtype=torch.float64, requires_grad=True) for n in (5, 2)]
    assert torch.autograd.gradcheck(gathered_and_put_back, inputs)


def formats(gm: torch.fx.GraphModule) -> set[bool]:
    """Whether the kernels of convolutions lie in channels last."""
    kernels = [p for p in gm.parameters() if p.dim() == 4 and min(p.shape[1], p.shape[2]) > 1]
    assert kernels
    return {p.is_contiguous(memory_format=LAST) and not p.is_contiguous() for p in kernels}


@pytest.mark.parametrize("last", [False, True])
def test_a_shrunk_model_and_its_moments_keep_the_format(last: bool) -> None:
    gm = deep_copy(graph("resnet"))
    gm = gm.to(memory_format=LAST) if last else gm
    assert formats(dc.prune(gm, macs=0.5)) == {last}
    keep = {axis.name: list(range(axis.size // 2)) for axis in dc.infer_axes(gm).prunable if axis.size > 1}
    surgery = operate(gm.train(), keep, check=False)
    moments = {name: torch.zeros_like(p) for name, p in gm.named_parameters()}
    assert formats(surgery.model) == {last}
    for name, moment in surgery.plan(moments).items():
        assert moment.stride() == surgery.model.get_parameter(name).stride()


@pytest.mark.parametrize("kind", ["gates", "exits"])
@torch.no_grad()
def test_what_stays_stays_in_channels_last(kind: str) -> None:
    """The layers behind an exit, or inside a gated branch, see it; answers are those of the contiguous model."""
    made = gated_graph("resnet") if kind == "gates" else InsertExits(1)(graph("resnet")).gm
    dyn, x = dc.DynamicModel(made).eval(), CASES["resnet"].batch(12)
    if kind == "exits":  # about half of the samples stay
        lower, upper = dyn.all_logits(x)[0].softmax(-1).amax(-1).sort().values[5:7]
        dyn.policy = dc.ExitPolicy("max-softmax", (float(lower + upper) / 2,))
    else:  # about half of them run the first branch
        lower, upper = deciding(made, Forced({}))(x)[1][:, 0].sort().values[5:7]
        made.get_parameter("gates.0.out.bias").sub_((lower + upper) / 2)  # between two samples: no rounding decides
    expected = dyn.predict(x).logits
    dyn.to(memory_format=LAST)
    seen: list[bool] = []

    def look(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if 1 < len(args[0]) < 12:
            seen.append(args[0].is_contiguous(memory_format=LAST))

    for k in range(4):
        dyn.trunk.get_submodule(f"blocks.{k}.c1").register_forward_pre_hook(look)
    answer = dyn.predict(x.to(memory_format=LAST))
    assert seen and all(seen)
    torch.testing.assert_close(answer.logits, expected, rtol=1e-4, atol=1e-5)
