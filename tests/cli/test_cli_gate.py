"""Skip gates on the command line and in recipes: training, reports, pictures, and models with gates and exits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import DATA, reported, told
from data import make_stripes
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from trained import on_stripes

import dyncompress as dc
from dyncompress.cli.report import gate_payoff as skipping
from dyncompress.cli.report.gate_plots import plot_gates
from dyncompress.compress.evaluation.report_entries import DynamicEntry, StaticEntry
from dyncompress.compress.gates.gate_report import GateUse
from dyncompress.compress.options.steps import Gate
from dyncompress.compress.recipes.recipe import read_recipe
from dyncompress.compress.training.store import Store
from dyncompress.passes.graph.meta import gates_of

pytestmark = pytest.mark.filterwarnings("ignore:the .* gates cost")  # the models are tiny


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(F.relu(self.a(x))))


class Residual(nn.Module):
    """Images (B, 1, 8, 8) in 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(3)))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


ARCH = f"{__name__}:Residual"
NET = ("net.pt", "--arch", ARCH, "--data", DATA)
STEM, BRANCH, FC = 64 * 9 * 8, 2 * 64 * 9 * 8 * 8, 8 * 3  # MACs
BRANCHES = [f"blocks.{k}:branch" for k in range(3)]


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return on_stripes(Residual(), steps=40)


@pytest.fixture(scope="module")
def gated(trained: nn.Module) -> dc.DynamicModel:
    """Trained gates, moved so that all of them open for some samples only."""
    model = dc.gate(
        trained, data=make_stripes(), macs=0.6, settle=0, training=dc.Training(epochs=4), run=dc.Run(progress=False)
    )
    with torch.no_grad():
        for gate in range(3):
            out = model.trunk.get_submodule(f"gates.{gate}.out")
            out.weight.mul_(20)
            before = model.trunk.get_parameter(f"gates.{gate}.out.bias")
            before.zero_()
    return model


@pytest.fixture
def here(trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    torch.save(trained.state_dict(), "net.pt")
    return tmp_path


def test_an_interrupted_gate_ends_as_the_function_does(
    here: Path, trained: nn.Module, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("gate", *NET, "--kind", "skipnet", "--macs", "0.7", "--epochs", "3")
    save, saved = Store.save, []

    def stop(store: Store, state: dict[str, Any]) -> None:
        save(store, state)
        saved.append(store.folder)
        if len(saved) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", stop)
        assert "--out runs/gate-net-1 --resume" in told(capfd, *words, status=130)[1]
    assert saved[0] == saved[1] != saved[2]  # in the second phase
    report = reported(capfd, *words, "--resume")
    folder = Path("runs/gate-net-1")
    assert report["run_dir"] == str(folder) and report["onnx"] is None
    assert report["model"] == str(folder / "model.dyn.safetensors")
    for name in ("static", "gated"):
        entry = report[name]
        assert set(entry["latency_ms"]) == {"1", "256"} and entry["parameters"] > 0 and entry["bytes"] > 0
    assert report["gate"]["branches"] == BRANCHES and report["gate"]["phases"] == ["supervised", "hybrid"]
    assert report["gate"]["branch_macs"] == [BRANCH] * 3
    assert json.loads((folder / "report.json").read_text()) == report
    asked = Gate(kind="skipnet", macs=0.7, training=dc.Training(epochs=3))
    assert read_recipe(folder / "recipe.yaml").steps == (asked,)
    assert "Skip gates (skipnet)" in (folder / "table.txt").read_text() and not (folder / "steps").exists()
    with Image.open(folder / "gates.png") as picture:
        assert picture.width > 400

    data = make_stripes()
    same = dc.gate(
        trained, data=data, kind="skipnet", macs=0.7, training=dc.Training(epochs=3), run=dc.Run(progress=False)
    )
    model = dc.load(report["model"])
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in model.state_dict().items())
    out = same.predict(data.test.inputs)
    right = out.logits.argmax(-1) == data.test.labels
    assert report["gated"]["accuracy"] == pytest.approx(float(right.double().mean()))
    assert report["gated"]["mean_macs"] == pytest.approx(float(out.macs.double().mean()))
    rates = same.predict(data.calibration.inputs).gates.double().mean(0)
    assert report["gate"]["open"] == pytest.approx(rates.tolist())

    assert reported(capfd, *words, "--resume") == report
    assert "--overwrite" in told(capfd, *words, "--out", str(folder), status=2)[1]


def test_wrong_requests_are_one_line(here: Path, gated: dc.DynamicModel, capfd: pytest.CaptureFixture[str]) -> None:
    dc.save(gated, "gated.dyn")
    wrong = {
        ("gate", *NET[:3], "--macs", "0.6"): "gate learns from data: give labelled data",
        ("gate", *NET): "give either macs or rate",
        ("gate", *NET, "--macs", "0.6", "--rate", "0.5"): "give either macs or rate",
        ("gate", *NET, "--macs", "0.6", "--kind", "skip"): "skip",
        ("gate", *NET, "--macs", "0.01"): "what cannot be skipped costs",
        ("gate", "nets:ConvNet", "--data", DATA, "--macs", "0.6"): "no residual branch",
        ("gate", "gated.dyn", "--data", DATA, "--macs", "0.6"): "dynamic already",
        ("prune", "gated.dyn", "--data", DATA, "--ratio", "0.5"): "dynamic already",
    }
    for words, expected in wrong.items():
        out, err = told(capfd, *words, status=2)
        *_, line = err.splitlines()
        assert line.startswith("dyncompress: ") and expected in line and out == "", (words, err)
    assert not list(Path("runs").iterdir())


@torch.no_grad()
def test_every_gate_open_is_the_model_without_gates(gated: dc.DynamicModel) -> None:
    """Held to the gated graph whose gates' logits are all pushed up."""
    whole, x = skipping.opened(gated), make_stripes().test.inputs
    pushed = dc.DynamicModel(dc.capture(gated.trunk, x)).eval()
    before = [pushed.trunk.get_parameter(f"gates.{k}.out.bias") for k in range(3)]
    kept = [bias.clone() for bias in before]
    for bias in before:
        bias.fill_(1e4)
    torch.testing.assert_close(whole(x), pushed.predict(x).logits)
    for bias, value in zip(before, kept, strict=True):
        bias.copy_(value)
    assert not any(name.startswith("gates") for name, _ in whole.named_modules())
    assert whole.get_parameter("fc.weight") is gated.trunk.get_parameter("fc.weight")
    assert not gates_of(whole) and gated.gates == BRANCHES


def test_whether_skipping_pays() -> None:
    size: dict[str, Any] = {"accuracy": None, "parameters": 1, "bytes": 4}
    whole = StaticEntry(macs=100, latency_ms={"1": 2.0, "256": 20.0}, **size)
    gated = DynamicEntry(mean_macs=60.0, latency_ms={"1": 1.7, "256": 15.9}, exits=(), **size)
    line = skipping.does_not_pay(gated, whole, "cpu")
    assert line == "skipping does not pay on cpu: 60% of the MACs take 85% of the time at batch 1"
    assert skipping.does_not_pay(replace(gated, latency_ms={"1": 1.59, "256": 15.9}), whole, "cpu") is None
    assert skipping.does_not_pay(replace(gated, mean_macs=None), whole, "cpu") is None


def test_bench_and_inspect(here: Path, gated: dc.DynamicModel, capfd: pytest.CaptureFixture[str]) -> None:
    dc.save(gated, "gated.dyn")
    (entry,) = reported(capfd, "bench", "gated.dyn", "--data", DATA)["models"]
    out = gated.predict(make_stripes().test.inputs)
    assert entry["mean_macs"] == pytest.approx(float(out.macs.double().mean()))
    assert entry["open"]["macs"] == STEM + 3 * BRANCH + FC
    assert set(entry["open"]["latency_ms"]) == {"1", "256"}
    report = reported(capfd, "inspect", *NET)
    assert [(b["name"], b["gate"], b["reason"]) for b in report["branches"]] == [(b, False, None) for b in BRANCHES]
    assert [b["macs"] for b in report["branches"]] == [BRANCH] * 3
    assert [b["gate"] for b in reported(capfd, "inspect", "gated.dyn")["branches"]] == [True] * 3


def test_exits_in_a_gated_model(here: Path, gated: dc.DynamicModel, capfd: pytest.CaptureFixture[str]) -> None:
    """Samples skip and leave: each has the answer, and has paid for the open branches, of its exit."""
    dc.save(gated, "gated.dyn")
    options = ("--data", DATA, "--exits", "2", "--epochs", "2", "--macs", "0.7")
    report = reported(capfd, "convert", "gated.dyn", *options)
    assert {"gated", "dynamic"} < set(report) and "static" not in report
    model, x = dc.load(report["model"]), make_stripes().test.inputs
    assert model.gates == BRANCHES and len(model.exits) == 2
    out, every = model.predict(x), model.all_logits(x)
    expected = torch.stack([every[k][i] for i, k in enumerate(out.exit_index.tolist())])
    torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-5)
    assert bool((out.exit_index < 2).any()) and not bool(out.gates.all()) and bool(out.gates.any())
    torch.testing.assert_close(every[-1], gated.predict(x).logits, rtol=1e-4, atol=1e-5)
    assert report["dynamic"]["mean_macs"] == pytest.approx(float(out.macs.double().mean()))
    chosen = [p for row, p in zip(model.table, report["curve"], strict=True) if row.policy == model.policy]
    assert [p["mean_macs"] for p in chosen] == pytest.approx([report["dynamic"]["mean_macs"]])
    refused = told(capfd, "gate", report["model"], "--data", DATA, "--macs", "0.6", status=2)[1]
    assert "gate the static model, then add the exits by convert" in refused


def test_models_with_exits_get_no_gates(trained: nn.Module, gated: dc.DynamicModel) -> None:
    leaving = dc.convert(
        gated, exits=1, data=make_stripes(), training=dc.Training(epochs=1), run=dc.Run(progress=False)
    )
    assert leaving.gates == BRANCHES and len(leaving.exits) == 1
    for model in (leaving, leaving.trunk):
        with pytest.raises(dc.RequestError, match="gate the static one"):
            dc.gate(model, data=make_stripes(), macs=0.6)
    with pytest.raises(dc.RequestError, match="already has a module named 'gates'"):
        dc.gate(gated, data=make_stripes(), macs=0.6)


RECIPE = f"""
model: {ARCH}
data: {DATA}
steps:
  - gate: {{rate: 0.5, gate: ff2, epochs: 1}}
  - convert: {{exits: 1, epochs: 1}}
"""


def test_a_recipe_gates_and_converts(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text(RECIPE)
    report = reported(capfd, "run", "recipe.yaml", "--set", "gate.rate=0.9", "--set", "gate.settle=0")
    assert {"static", "gated", "dynamic"} < set(report)
    assert report["gate"]["kind"] == "gumbel" and report["gate"]["branches"] == BRANCHES
    folder = Path(report["run_dir"])
    assert all((folder / name).exists() for name in ("gates.png", "curve.png", "exits.png"))
    Path("recipe.yaml").write_text(RECIPE.replace("rate", "rat"))
    assert "unknown key 'rat'" in told(capfd, "run", "recipe.yaml", status=2)[1]


@pytest.mark.parametrize("classes", [None, 3])
def test_the_picture_takes_any_number_of_classes(classes: int | None, tmp_path: Path) -> None:
    rates = ((0.5,) * 4,)
    by_class = None if classes is None else rates * classes
    use = GateUse(
        branches=tuple("abcd"), static_accuracy=1, accuracy=1, macs=1, open=rates[0], by_class=by_class,
        by_hardness=rates * 4,
    )  # fmt: skip
    plot_gates(tmp_path / "gates.png", use)
    with Image.open(tmp_path / "gates.png") as picture:
        assert picture.height > (800 if classes else 400)
