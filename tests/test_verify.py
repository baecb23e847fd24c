"""dc.verify: equal models are called equal; a planted difference is found where it was planted."""

import pytest
import torch
from torch import nn

import dyncompress as dc
from dyncompress.model_zoo.models import build, example_input


def case(name: str, exact: bool = True) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule, dict[str, list[int]]]:
    torch.manual_seed(0)
    gm = dc.capture(build(name).eval(), example_input(name))
    keep = {a.name: list(range(0, a.size, 2)) for a in dc.infer_axes(gm).prunable if a.kind != "branch"}
    return gm, dc.shrink(gm, keep, exact=exact), keep


@pytest.mark.parametrize("name", ["resnet-digits", "vit-digits", "lstm-digits"])
def test_a_shrunk_model_is_called_equal(name: str) -> None:
    gm, small, keep = case(name)
    found = dc.verify(gm, small, keep)
    assert found.ok and found.differences == () and found.error < 1e-4
    assert str(found).startswith("equal")
    assert dc.verify(gm.double(), small.double(), keep, tolerance=1e-9).ok


def test_it_runs_on_inputs_of_the_users_and_leaves_the_models_alone() -> None:
    gm, small, keep = case("resnet-digits")
    gm.train()
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    assert dc.verify(gm, small, keep, example_input("resnet-digits")).ok
    assert gm.training and all(torch.equal(before[k], v) for k, v in gm.state_dict().items())


def test_a_planted_difference_is_found_where_it_is() -> None:
    gm, small, keep = case("resnet-digits")
    name = [n for n, m in small.named_modules() if isinstance(m, nn.Conv2d)][4]
    with torch.no_grad():
        small.get_submodule(name).weight.mul_(1.01)
    found = dc.verify(gm, small, keep)
    first = found.differences[0]
    at = next(n for n in gm.graph.nodes if n.name == first.node)
    assert not found.ok and at.target == name and first.error == pytest.approx(0.01, rel=1e-3)
    assert first.node in str(found)


def test_a_changed_count_is_named_as_the_reason() -> None:
    gm, small, keep = case("vit-digits", exact=False)
    found = dc.verify(gm, small, keep)
    assert not found.ok and "exact=True" in str(found)


def test_not_a_number_is_a_difference() -> None:
    gm, small, keep = case("resnet-digits")
    with torch.no_grad():
        next(iter(small.parameters())).fill_(torch.nan)
    assert not dc.verify(gm, small, keep).ok


def test_wrong_requests_are_refused() -> None:
    gm, small, keep = case("resnet-digits")
    with pytest.raises(dc.RequestError, match="Linear"):
        dc.verify(gm, nn.Linear(2, 2), keep)  # type: ignore[arg-type]
    with pytest.raises(dc.RequestError, match="no axis named"):
        dc.verify(gm, small, {"nothing": [0]})
    with pytest.raises(dc.RequestError, match="shape"):
        dc.verify(gm, small, keep, torch.zeros(1, 2, 3))
