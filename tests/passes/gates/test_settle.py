"""Gates that always decide alike leave the model, and with them branches that never run."""

from pathlib import Path

import pytest
import torch
from cases import CASES, GATED, call, gated_graph, graph
from dynamic_models import Forced

import dyncompress as dc
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.passes.gates.read_gates import deciding
from dyncompress.passes.gates.settle_gates import SettleGates
from dyncompress.passes.graph.cost import count_macs, count_parameters
from dyncompress.passes.graph.meta import gates_of, is_dynamic
from dyncompress.runtime.predict.dynamic import DynamicModel

pytestmark = pytest.mark.filterwarnings("ignore:the .* gates cost")  # the models are tiny


@pytest.mark.parametrize(("name", "gate"), GATED)
def test_it_answers_as_with_decisions_forced(name: str, gate: str, tmp_path: Path) -> None:
    gm, batch = gated_graph(name, gate), CASES[name].batch(7)
    branches = [gate.branch for gate in gates_of(gm)]
    result = SettleGates(always=(branches[0],), never=(branches[2],))(gm)
    settled = DynamicModel(result.gm).eval()
    with torch.no_grad():
        expected = call(deciding(gm, Forced({0: 1.0, 2: 0.0})), batch)[0][-1]
        for answer in (call(settled.trunk, batch)[-1], call(settled.predict, batch).logits):
            torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)
    assert settled.gates == [b for b in branches if b not in (branches[0], branches[2])]
    assert settled.static_macs < count_macs(gm) and count_parameters(settled.trunk) < count_parameters(gm)
    assert len(gates_of(gm)) == len(branches)  # the graph that was given is as it was
    dc.save(settled, tmp_path / "settled.safetensors")
    again = dc.load(tmp_path / "settled.safetensors")
    assert isinstance(again, DynamicModel) and again.gates == settled.gates
    torch.testing.assert_close(call(again.predict, batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_without_any_gate_left_it_is_the_static_model(tmp_path: Path) -> None:
    gm, static, batch = gated_graph("resnet"), graph("resnet"), CASES["resnet"].batch(5)
    everything = SettleGates(always=tuple(gate.branch for gate in gates_of(gm)))(gm).gm
    assert not is_dynamic(everything) and count_macs(everything) == count_macs(static)
    assert {n for n, _ in everything.named_parameters()} == {n for n, _ in static.named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(call(everything, batch), call(static, batch))
    dc.save(everything, tmp_path / "static.safetensors")
    again = dc.load(tmp_path / "static.safetensors")
    with torch.no_grad():
        assert torch.equal(call(again, batch), call(everything, batch))
    with pytest.raises(dc.RequestError, match="neither exits nor skip gates"):
        DynamicModel(everything)


def test_what_never_runs_can_leave_with_its_last_gate() -> None:
    gm, batch = gated_graph("resnet"), CASES["resnet"].batch(5)
    branches = tuple(gate.branch for gate in gates_of(gm))
    bare = SettleGates(never=branches)(gm).gm.eval()
    with torch.no_grad():
        expected = call(deciding(gm, Forced(dict.fromkeys(range(len(branches)), 0.0))), batch)[0][-1]
        torch.testing.assert_close(call(bare, batch), expected, rtol=1e-4, atol=1e-5)
    assert not is_dynamic(bare)


def test_wrong_requests() -> None:
    gm = gated_graph("resnet")
    first = gates_of(gm)[0].branch
    with pytest.raises(dc.RequestError, match="'nope' has no gate; those that have one: "):
        SettleGates(never=("nope",))(gm)
    with pytest.raises(dc.RequestError, match="always and never"):
        SettleGates((first,), (first,))
    with pytest.raises(dc.RequestError, match="before convert adds them"):
        SettleGates((first,))(InsertExits(1)(gm).gm)
