"""The command line: what every command does, JSON keys, run folders."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ARCH, DATA
from data import make_stripes
from onnx_files import run as run_onnx
from torch import nn

from dyncompress.cli import commands
from dyncompress.cli.main import run
from dyncompress.compress.options.steps import Convert, Export
from dyncompress.compress.options.training_options import Training
from dyncompress.compress.recipes.recipe import read_recipe
from dyncompress.passes.capture.capture import capture
from dyncompress.runtime.files import checkpoint

ENTRY = {"accuracy", "parameters", "bytes", "latency_ms"}


def test_convert(weights: Path, cli: Any) -> None:
    outcome = cli("convert NET DATA --exits 2 --epochs 2 --max-loss 0.02 --json")
    assert outcome.status == 0, outcome.err
    report = outcome.report
    folder = Path("runs/convert-net-1")
    assert report["run_dir"] == str(folder)
    assert report["model"] == str(folder / "model.dyn.safetensors")
    assert report["onnx"] is None
    static, dynamic = report["static"], report["dynamic"]
    assert set(static) == ENTRY | {"macs"}
    assert set(dynamic) == ENTRY | {"mean_macs", "exits"}
    for entry in (static, dynamic):
        assert 0.8 <= entry["accuracy"] <= 1
        assert set(entry["latency_ms"]) == {"1", "256"}
    assert len(dynamic["exits"]) == 3
    assert {"at", "macs", "accuracy", "share"} <= set(dynamic["exits"][0])
    shares = [use["share"] for use in dynamic["exits"]]
    assert sum(shares) == pytest.approx(1)
    mean = sum(use["share"] * use["macs"] for use in dynamic["exits"])
    assert dynamic["mean_macs"] == pytest.approx(mean)
    assert json.loads((folder / "report.json").read_text()) == report
    for name in ("curve.png", "exits.png", "table.txt", "recipe.yaml"):
        assert (folder / name).stat().st_size > 100
    assert not (folder / "steps").exists()
    recipe = read_recipe(folder / "recipe.yaml")
    assert recipe.steps == (Convert(exits=2, max_loss=0.02, training=Training(epochs=2)),)
    assert checkpoint.read_info(report["model"])["measured"]["accuracy"] == dynamic["accuracy"]

    again = cli("convert NET DATA --exits 2 --epochs 2 --max-loss 0.02 --resume --json")
    assert again.report == report
    repeated = cli(f"run {folder}/recipe.yaml --json")
    assert repeated.status == 0, repeated.err
    assert repeated.report["dynamic"]["accuracy"] == dynamic["accuracy"]
    assert repeated.report["run_dir"] == "runs/run-net-1"


def test_the_curve_is_the_policys_own(weights: Path, cli: Any) -> None:
    """The point of the curve that the chosen thresholds lie at costs and answers what predict() does."""
    report = cli("convert NET DATA --exits 1 --epochs 1 --macs 0.9 --json").report
    curve = report["curve"]
    assert [p["mean_macs"] for p in curve] == sorted(p["mean_macs"] for p in curve)
    model = checkpoint.load(report["model"])
    test = make_stripes().test
    out = model.predict(test.inputs)
    chosen = next(p for row, p in zip(model.table, curve, strict=True) if row.policy == model.policy)
    assert chosen["mean_macs"] == pytest.approx(out.macs.double().mean().item())
    assert chosen["accuracy"] == pytest.approx((out.logits.argmax(-1) == test.labels).double().mean().item())


def test_a_promised_risk_is_reported(weights: Path, cli: Any) -> None:
    outcome = cli(
        "convert NET DATA --exits 1 --epochs 1 --risk 0.2 --confidence 0.8 --rule margin --out promised --json"
    )
    assert outcome.status == 0, outcome.err
    risk = outcome.report["risk"]
    assert risk["loss"] == "disagreement" and risk["observed"] < 0.2 and risk["p_value"] <= 0.2
    assert (Path("promised") / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert "disagreement at most 0.2 with confidence 0.8" in (Path("promised") / "table.txt").read_text()
    refused = cli("convert NET DATA --exits 1 --epochs 1 --risk 0.0001 --out impossible")
    assert refused.status == 2 and "it takes at least 23025" in refused.err
    assert not Path("impossible").exists()


def test_prune(weights: Path, cli: Any) -> None:
    outcome = cli("prune NET DATA --macs 0.5 --finetune 1 --out small --json")
    assert outcome.status == 0, outcome.err
    report = outcome.report
    assert report["model"] == "small/model.safetensors"
    static, pruned = report["static"], report["pruned"]
    assert set(pruned) == ENTRY | {"macs"}
    assert pruned["macs"] <= 0.51 * static["macs"]
    assert pruned["parameters"] < static["parameters"]
    assert {layer["name"] for layer in report["layers"]} >= {"layers.0.0.weight", "fc.weight"}
    small = checkpoint.load(report["model"])
    assert small(torch.rand(5, 1, 8, 8)).shape == (5, 3)
    for key, entry in (("macs_before", static), ("macs_after", pruned)):
        assert sum(layer[key] for layer in report["layers"]) == entry["macs"]
    for layer in report["layers"]:
        assert layer["kept"] == pytest.approx(math.prod(layer["after"]) / math.prod(layer["before"]))
    assert report["prune"]["steps"][-1]["left"] == pytest.approx(pruned["macs"] / static["macs"])
    with open("small/layers.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [layer["name"] for layer in report["layers"]]
    kept = checkpoint.read_info(report["model"])["prune"]["kept"]
    assert len(kept["layers.0.0.weight:0"]["kept"]) == small.get_submodule("layers.0.0").out_channels
    assert Path("small/kept.png").read_bytes().startswith(b"\x89PNG")


def test_prune_by_latency_in_steps(weights: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").resolve()))
    options = "--latency 0.9 --latency-batch 256 --importance activation --scope block --steps 2 --depth --round-to 1"
    outcome = cli(f"prune NET DATA {options} --out fast --verbose")
    assert outcome.status == 0, outcome.err
    steps = json.loads(Path("fast/report.json").read_text())["prune"]["steps"]
    assert [step["goal"] for step in steps] == pytest.approx([0.9**0.5, 0.9])
    assert all(f"cut {n}: {step['left']:.3f} of the latency" in outcome.out for n, step in enumerate(steps, 1))
    assert list(Path("cache/dyncompress").glob("latency-*.json"))


def test_prune_without_data(weights: Path, cli: Any) -> None:
    outcome = cli("prune NET --ratio 0.5 --round-to 2 --ignore fc --input-shape 1,8,8")
    assert outcome.status == 0, outcome.err
    assert "layers.0.0.weight" in outcome.out
    report = json.loads(Path("runs/prune-net-1/report.json").read_text())
    assert report["pruned"]["accuracy"] is None
    assert all(layer["after"][0] % 2 == 0 for layer in report["layers"][:3])


def test_inspect(weights: Path, cli: Any) -> None:
    outcome = cli("inspect NET --input-shape 1,8,8 --json")
    report = outcome.report
    assert report["macs"] == 64 * 9 * (8 + 8 * 16 + 16 * 16) + 48
    axes = {axis["name"]: axis for axis in report["axes"]}
    assert axes["layers.0.0.weight:0"]["prunable"]
    assert ["layers.1.0.weight", 1] in axes["layers.0.0.weight:0"]["slices"]
    assert axes["layers.0.0.weight:2"]["reason"] == "a kernel size"
    assert {"at", "path", "single", "macs"} == set(report["cut_points"][0])
    assert sum(block["macs"] for block in report["blocks"]) == report["macs"]
    assert "Frozen axes" in outcome.err
    assert "Frozen axes" in cli("inspect NET --input-shape 1,8,8").out


def test_bench(weights: Path, cli: Any) -> None:
    report = cli("prune NET DATA --params 0.6 --out small --json").report
    outcome = cli(f"bench {report['model']} small/model.safetensors DATA --json")
    assert outcome.status == 0, outcome.err
    first, second = outcome.report["models"]
    assert set(first) == ENTRY | {"macs", "name"}
    assert first["name"] == report["model"]
    assert first["accuracy"] == second["accuracy"] == report["pruned"]["accuracy"]
    assert cli("bench NET --input-shape 1,8,8").status == 0


def test_export(net: nn.Module, weights: Path, cli: Any) -> None:
    outcome = cli("export NET static.onnx --input-shape 1,8,8 --json")
    assert outcome.status == 0, outcome.err
    report = outcome.report
    assert report["onnx"] == "static.onnx"
    assert report["check"]["bytes"] == Path("static.onnx").stat().st_size
    assert set(report["check"]["max_error"]) == {"1", "3", "64"}
    images = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(torch.from_numpy(run_onnx("static.onnx", images)["logits"]), net(images))
    assert "exists" in cli("export NET static.onnx --input-shape 1,8,8").line
    outcome = cli("export NET static.onnx DATA --overwrite")
    assert outcome.status == 0
    assert "largest error, batch 64" in outcome.out


def test_a_recipe_of_all_steps(weights: Path, cli: Any) -> None:
    prune, convert, export = "{prune: {macs: 0.7}}", "{convert: {exits: 1, epochs: 1, macs: 0.9}}", "export"
    Path("r.yaml").write_text(f"model: net.pt\narch: {ARCH}\nsteps: [{prune}, {convert}, {export}]")
    outcome = cli(f"run r.yaml --set data={DATA} --out all --json")
    assert outcome.status == 0, outcome.err
    report = outcome.report
    assert [name for name in report if name in ("static", "pruned", "dynamic")] == ["static", "pruned", "dynamic"]
    assert report["onnx"] == "all/model.onnx"
    test = make_stripes().test
    answers = run_onnx(report["onnx"], test.inputs)
    assert answers["macs"].mean() == pytest.approx(report["dynamic"]["mean_macs"])
    assert sum(report["check"]["exits"]) == 1 + 3 + 64


@pytest.mark.parametrize("kind", ["checkpoint", "archive", "module"])
def test_every_kind_of_file_converts(kind: str, net: nn.Module, weights: Path, cli: Any) -> None:
    images = torch.rand(2, 1, 8, 8)
    option = "--allow-pickle" if kind == "module" else ""
    if kind == "checkpoint":
        checkpoint.save(capture(net, images), "model.pt")
    elif kind == "module":
        torch.save(net, "model.pt")
    else:
        program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        torch.export.save(program, "model.pt")
    outcome = cli(f"convert model.pt DATA --exits 1 --epochs 1 --macs 0.9 {option} --json")
    assert outcome.status == 0, outcome.err
    assert outcome.report["static"]["accuracy"] > 0.8


def test_demo_is_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(commands, "_run", lambda command, recipe, *rest: seen.append((command, recipe)))
    assert run(["demo", "--seed", "3"]) == 0
    ((command, recipe),) = seen
    assert (command, recipe.model, recipe.data, recipe.seed) == ("demo", "zoo:vgg-digits", "digits", 3)
    assert [type(step) for step in recipe.steps] == [Convert, Export]


def test_help_is_quick_and_needs_no_torch() -> None:
    ask, check = "run(['convert', '--help'])", "assert 'torch' not in sys.modules"
    code = f"import sys; from dyncompress.cli.main import run; {ask}; {check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--exits" in done.stdout
    assert "--max-loss" in done.stdout
