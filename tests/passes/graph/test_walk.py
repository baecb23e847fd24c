"""Walks, the module tree, the rewriter and the call structure, on a graph small enough to read."""

import pytest
import torch
from torch import Tensor, fx, nn

from dyncompress.errors import DynCompressError
from dyncompress.passes.capture.capture import capture
from dyncompress.passes.graph.call_structure import call_structure, called_like, nested_inputs, nested_output
from dyncompress.passes.graph.module_tree import put_module, put_tensor, remove_tensor, sharing
from dyncompress.passes.graph.rewriter import Rewriter
from dyncompress.passes.graph.walk import downstream, serving, unread, upstream, uses

aten = torch.ops.aten


class Net(nn.Module):
    """x -> a -> b -> a + b, with b written to through a view that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        a = self.a(x)
        b = self.b(torch.relu(a))
        b[:, :1].mul_(2)
        return {"logits": a + b, "scaled": x * scale}


@pytest.fixture
def gm() -> fx.GraphModule:
    return capture(Net().eval(), {"x": torch.randn(2, 4), "scale": torch.randn(2, 4)})


@pytest.fixture
def named(gm: fx.GraphModule) -> dict[str, fx.Node]:
    return {node.name: node for node in gm.graph.nodes}


def names(nodes: object) -> set[str]:
    return {node.name for node in nodes}  # type: ignore[attr-defined]


def test_up_and_down(gm: fx.GraphModule, named: dict[str, fx.Node]) -> None:
    assert names(upstream([named["relu"]])) == {"x", "a", "relu"}
    assert names(upstream([named["relu"]], stop={named["a"]})) == {"relu"}
    assert names(downstream(gm.graph, [named["scale"]])) == {"scale", "mul", "output"}
    assert names(downstream(gm.graph, [named["b"]])) >= {"b", "add", "output"}


def test_what_serves_one_addend(gm: fx.GraphModule, named: dict[str, fx.Node]) -> None:
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    aside, total = unread(gm.graph), named["add"]
    assert [node.target for node in aside] == [aten.slice.Tensor, aten.mul_.Tensor]
    assert serving(named["b"], {total}, aside, order) == [named["a"], named["relu"], named["b"], *aside]
    assert serving(named["b"], {total}, aside, order, lambda n: n is named["a"]) == [named["relu"], named["b"], *aside]
    assert serving(named["a"], {total}, aside, order) == []  # it is read on the way to the other addend too


def test_uses(named: dict[str, fx.Node]) -> None:
    found = {(user.name, used.name) for user, used in uses(named["a"], lambda user: user.name == "relu")}
    assert found == {("relu", "a"), ("add", "a"), ("b", "relu")}


def test_call_structure(gm: fx.GraphModule, named: dict[str, fx.Node]) -> None:
    assert call_structure(gm.graph).arguments == ["x", "scale"]
    assert nested_inputs(gm.graph, [1, 2]) == ((), {"x": 1, "scale": 2})
    assert nested_output(gm.graph) == {"logits": named["add"], "scaled": named["mul"]}
    assert call_structure(called_like(gm.graph)) == call_structure(gm.graph)
    with pytest.raises(DynCompressError, match="was not captured"):
        call_structure(fx.Graph())


def test_rewriting(gm: fx.GraphModule, named: dict[str, fx.Node]) -> None:
    made: list[str] = []

    def missing(node: fx.Node) -> fx.Node:
        made.append(node.name)
        return rewriter.stand_in(node)

    rewriter = Rewriter(fx.Graph(), below="inner.net", missing=missing)
    rewriter.copy(named["a"])
    rewriter.graph.output(rewriter.copy(named["relu"]))
    assert made == ["x"] and [n.name for n in rewriter.graph.nodes] == ["x", "a", "relu", "output"]
    root, x = nn.Module(), torch.randn(3, 4)
    put_module(root, "inner.net", gm)
    assert torch.equal(fx.GraphModule(root, rewriter.graph)(x), gm.a(x).relu())


def test_module_tree() -> None:
    root, layer = nn.Module(), nn.Linear(2, 2)
    put_tensor(root, "deep.down.layer.scale", nn.Parameter(torch.ones(1)))
    put_tensor(root, "deep.table", torch.ones(2), persistent=False)
    there = root.get_submodule("deep.down.layer")
    put_module(root, "deep.down", nn.ReLU())
    assert root.get_submodule("deep.down.layer") is there and isinstance(root.get_submodule("deep.down"), nn.ReLU)
    assert list(root.state_dict()) == ["deep.down.layer.scale"]
    shared = sharing(root)
    shared.add_module("layer", layer)
    assert shared.get_submodule("deep") is root.get_submodule("deep") and "layer" not in root._modules
    remove_tensor(root, "deep.down.layer.scale")
    remove_tensor(root, "deep.down.layer.scale")
    assert [name for name, _ in root.named_modules()] == ["", "deep"]
