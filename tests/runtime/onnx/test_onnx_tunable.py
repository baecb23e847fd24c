"""ONNX files whose thresholds are inputs: with others, the same samples leave as under PyTorch's policy with those."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, call, graph, graph_with_exits
from dynamic_models import spread
from onnx_files import run, session
from torch import Tensor, nn

from dyncompress.errors import RequestError
from dyncompress.passes.capture.capture import capture
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.runtime.onnx.export import export_onnx
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import ExitPolicy


def between(model: DynamicModel, policy: ExitPolicy, batch: Any, share: float) -> tuple[float, ...]:
    """Thresholds well between two samples' scores, with about that share of the samples below."""
    found, state = [], ()
    for k, z in enumerate(call(model.all_logits, batch)[:-1]):
        score, state = policy.score(k, z, state)
        score = score.sort().values
        at = int(share * len(score))
        found.append(float((score[at - 1] + score[at]) / 2))
    return tuple(found)


@pytest.mark.parametrize(
    ("name", "rule"),
    [("two-inputs", "max-softmax"), ("two-inputs", "entropy"), ("two-inputs", "patience"), ("text", "margin")],
)
def test_thresholds_can_be_changed_in_the_file(name: str, rule: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = spread(name), CASES[name].batch(40)
    if rule == "patience":
        choices: list[tuple[float, ...]] = [(1.0, 1.0), (1.0, 2.0)]
    else:
        choices = [between(model, ExitPolicy(rule, (0.5, 0.5)), batch, share) for share in (0.3, 0.5, 0.8)]
    model.policy = ExitPolicy(rule, choices[0])
    report = export_onnx(model, tmp_path / "a.onnx", tunable=True)
    made, exits = session(tmp_path / "a.onnx"), set()
    assert [i.name for i in made.get_overridable_initializers()] == ["threshold_0", "threshold_1"]
    assert report.inputs == [*(i.name for i in made.get_inputs()), "threshold_0", "threshold_1"]
    for thresholds in choices:
        wanted = call(model.with_policy(ExitPolicy(rule, thresholds)).predict, batch)
        settings = {} if thresholds == choices[0] else {f"threshold_{k}": t for k, t in enumerate(thresholds)}
        got = run(made, batch, **settings)
        assert got["exit_index"].tolist() == wanted.exit_index.tolist()
        np.testing.assert_allclose(got["logits"], wanted.logits.numpy(), rtol=1e-4, atol=1e-5)
        exits.add(tuple(got["exit_index"].tolist()))
    assert len(exits) == len(choices)
    one = run(made, batch, threshold_1=choices[1][1])["exit_index"].tolist()  # the others keep their default
    assert (
        one
        == call(model.with_policy(ExitPolicy(rule, (choices[0][0], choices[1][1]))).predict, batch).exit_index.tolist()
    )


def test_exits_that_are_off_have_no_threshold(tmp_path: Path) -> None:
    model = spread("two-inputs").with_policy(ExitPolicy("max-softmax", (None, 0.5)))
    assert export_onnx(model, tmp_path / "a.onnx", tunable=True).inputs == ["x", "late", "threshold_1"]
    assert export_onnx(model, tmp_path / "b.onnx").inputs == ["x", "late"]


class Clash(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, threshold_0: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(threshold_0)))


def test_nothing_to_tune(tmp_path: Path) -> None:
    for model in (graph("two-inputs"), DynamicModel(graph_with_exits("two-inputs"))):
        with pytest.raises(RequestError, match="no exit that is on"):
            export_onnx(model, tmp_path / "a.onnx", tunable=True)
    clash = DynamicModel(InsertExits(1)(capture(Clash(), torch.randn(2, 4))).gm, ExitPolicy("max-softmax", (0.5,)))
    with pytest.raises(RequestError, match="an input named threshold_0, the name of a threshold"):
        export_onnx(clash, tmp_path / "a.onnx", tunable=True)
    assert list(tmp_path.iterdir()) == []
