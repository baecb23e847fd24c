"""Files written before a graph's inputs, exits and gates had types of their own still load, and answer as they did."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import dyncompress as dc
from dyncompress.passes.graph.meta import FixedInput, GateNames, TensorInput, exits_of, gates_of, inputs_of

OLDER = Path(__file__).parent / "older"
INPUTS = (TensorInput("x", (53, 1, 8, 8), torch.float32, (0,)), FixedInput("scale", 2.0))


def images() -> Tensor:
    return torch.linspace(-1, 1, 4 * 64).sin().mul(40).sin().view(4, 1, 8, 8)


def close(found: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_pruned_model() -> None:
    model = dc.load(OLDER / "pruned.safetensors")
    assert isinstance(model, torch.fx.GraphModule) and inputs_of(model) == INPUTS
    assert exits_of(model) == gates_of(model) == ()
    close(
        model(images(), 2.0),
        [
            [-0.69491082, -2.36484766, -2.86388636],
            [-0.63813978, -6.97003317, -4.89485264],
            [-0.02803046, -7.29476595, -4.84037590],
            [-0.74081713, -2.62831450, -2.99611187],
        ],
    )
    with pytest.raises(dc.RequestError, match=r"input 'scale' is 3\.0; the model was captured with 2\.0 there"):
        dc.verify(model, model, {}, inputs=(images(), 3.0))


def test_a_model_with_an_exit_and_a_gate(tmp_path: Path) -> None:
    model = dc.load(OLDER / "dynamic.safetensors")
    assert isinstance(model, dc.DynamicModel) and inputs_of(model.trunk) == INPUTS
    assert exits_of(model.trunk) == ("out",)
    assert gates_of(model.trunk) == (GateNames("conv:branch", "squeeze", "gt_scalar"),)
    found = model.predict(images(), 2.0)
    assert found.exit_index.tolist() == [0, 0, 1, 1] and found.macs.tolist() == [407, 407, 419, 419]
    close(
        found.logits,
        [
            [0.36394924, 0.85534555, 0.05264410],
            [0.36596259, 0.85364550, 0.05599488],
            [6.67673922, -3.81090593, -2.32117724],
            [4.87274647, -1.73374474, -1.33869994],
        ],
    )
    everybody = model.with_policy(dc.ExitPolicy.never(1))
    assert everybody.predict(images(), 2.0).gates.tolist() == [[True], [True], [False], [False]]
    dc.save(model, tmp_path / "again.safetensors")
    again = dc.load(tmp_path / "again.safetensors")
    assert torch.equal(again.predict(images(), 2.0).logits, found.logits)
