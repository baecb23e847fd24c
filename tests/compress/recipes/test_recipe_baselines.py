"""The baselines as steps of a recipe, by the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data import make_stripes
from nets import seeded

import dyncompress as dc
from dyncompress.cli.main import run
from dyncompress.passes.rewrites.low_rank import LowRank

HEAD = "model: nets:small_resnet\ndevice: cpu\n"
TRAINED = "finetune: 1, lr: 1e-2, batch_size: 32"


def report_of(tmp_path: Path, steps: str) -> dict[str, Any]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{HEAD}data: data:make_stripes\nsteps:\n{steps}")
    assert run(["run", str(recipe), "--out", str(tmp_path / "out")]) == 0
    return json.loads((tmp_path / "out" / "report.json").read_text())


def test_zeros_on_top_of_low_rank(tmp_path: Path) -> None:
    first, second = f"{{params: 0.6, {TRAINED}}}", f"{{sparsity: 0.5, {TRAINED}}}"
    report = report_of(tmp_path, f"- low-rank: {first}\n- unstructured: {second}\n")
    static, thin, zeroed = (report[name]["parameters"] for name in ("static", "low-rank", "unstructured"))
    assert thin == zeroed <= 0.6 * static
    assert report["low-rank"]["macs"] < report["static"]["macs"]
    result = dc.load(report["model"])
    expected = LowRank(params=0.6)(dc.capture(seeded(), make_stripes().train[0][0][None])).gm
    assert {n: p.shape for n, p in result.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    weights = torch.cat([p.flatten() for p in result.parameters() if p.dim() > 1])
    assert int((weights == 0).sum()) == round(0.5 * len(weights))  # after the training, too
    assert not torch.equal(result.get_parameter("head.1.bias"), expected.get_parameter("head.1.bias"))  # it was trained


def test_zeros_by_layer_without_training(tmp_path: Path) -> None:
    report = report_of(tmp_path, "- unstructured: {sparsity: 0.25, scope: layer}\n")
    for name, weight in seeded().named_parameters():
        if weight.dim() > 1:
            small = dc.load(report["model"]).get_parameter(name)
            threshold = weight.abs().flatten().kthvalue(round(0.25 * weight.numel())).values
            assert torch.equal(small, weight * (weight.abs() > threshold))


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("low-rank: {params: 0.5, finetune: 1}", "low-rank with finetune needs labelled data"),
        ("unstructured: {finetune: 1}", "unstructured with finetune needs labelled data"),
        ("low-rank", "exactly one of energy, rank, macs, params"),
        ("unstructured: {sparsity: 2}", "sparsity is the share of weights"),
    ],
)
def test_mistakes_are_one_line(step: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{HEAD}input_shape: [1, 8, 8]\nsteps: [{step}]\n")
    assert run(["run", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
