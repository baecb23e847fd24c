"""The command line: JSON keys, run folders, exit statuses, and one line for every mistake."""

import csv
import json
import math
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompress.cli import commands
from dyncompress.cli.main import run
from dyncompress.cli.report import layers, plots
from dyncompress.cli.runs import folders
from dyncompress.cli.runs import run_recipe as job
from dyncompress.compress.options.steps import Convert, Export, Prune
from dyncompress.compress.pruning.kept_indices import KeptAxis
from dyncompress.compress.recipes import take_step as steps
from dyncompress.compress.recipes.recipe import read_recipe
from dyncompress.compress.training.store import Store
from dyncompress.model_zoo.load_data import ArrayDataset, Splits
from dyncompress.passes.capture.capture import capture
from dyncompress.runtime.files import checkpoint

HERE = Path(__file__).parent
ENTRY = {"accuracy", "parameters", "bytes", "latency_ms"}


class Net(nn.Module):
    """Images (B, 1, 8, 8) in 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 8, 16, 16)
        pairs = pairwise(widths)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairs)
        )
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3)))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x.mean((2, 3))
        return x.amax((2, 3))


def samples(count: int, seed: int) -> ArrayDataset:
    """Stripes along rows, along columns, or neither, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    stripe = torch.tensor([1.0, -1.0]).repeat(4)
    patterns = torch.stack([stripe[:, None].expand(8, 8), stripe[None, :].expand(8, 8), torch.zeros(8, 8)])
    images = patterns[labels] + 0.8 * torch.randn(count, 8, 8, generator=generator)
    return ArrayDataset(images[:, None], labels)


def make_net() -> nn.Module:
    return Net()


def make_branching() -> nn.Module:
    return Branching()


def make_data() -> Splits:
    return Splits(samples(240, 0), samples(120, 1), samples(90, 2), classes=3, name="stripes")


def make_rgb_data() -> Splits:
    rgb = ArrayDataset(torch.rand(12, 3, 8, 8), torch.arange(12) % 3)
    return Splits(rgb, rgb, rgb, classes=3, name="rgb")


def make_many_classes() -> Splits:
    many = ArrayDataset(torch.rand(12, 1, 8, 8), torch.arange(12))
    return Splits(many, many, many, classes=12, name="many")


ARCH, DATA = f"{__name__}:make_net", f"{__name__}:make_data"


@pytest.fixture(scope="session")
def net() -> nn.Module:
    torch.manual_seed(0)
    model, data = Net(), samples(240, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = F.cross_entropy(model(data.inputs), data.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def weights(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state dict of the trained net, in the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    torch.save(net.state_dict(), "net.pt")
    return Path("net.pt")


def words(command: str) -> list[str]:
    return shlex.split(command.replace("NET", f"net.pt --arch {ARCH}").replace("DATA", f"--data {DATA}"))


class Outcome:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def line(self) -> str:
        """The only line on standard error, but for what was told of the progress."""
        *told, line = self.err.splitlines()
        assert not any("Traceback" in text or "Error" in text for text in told)
        assert line.startswith("dyncompress: ")
        assert self.out == ""
        return line


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Any:
    def call(command: str) -> Outcome:
        capfd.readouterr()
        status = run(words(command))
        return Outcome(status, *capfd.readouterr())

    return call


# --- what the commands do ----------------------------------------------------------------------------------------


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
    assert recipe.steps == (Convert(exits=2, epochs=2, max_loss=0.02),)
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
    test = make_data().test
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


def test_an_interrupted_pruning_resumes(weights: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "prune NET DATA --params 0.6 --steps 2 --finetune 2 --batch-size 64"
    straight = cli(f"{command} --out straight --json").report
    save, saved = Store.save, []

    def stop(store: Store, state: dict[str, Any]) -> None:
        save(store, state)
        saved.append(state)
        if len(saved) == 3:  # the second cut's first epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", stop)
        assert cli(f"{command} --out halted").status == 130
    resumed = cli(f"{command} --out halted --resume --json").report
    assert resumed["pruned"]["accuracy"] == straight["pruned"]["accuracy"]
    one, two = (checkpoint.load(report["model"]).state_dict() for report in (straight, resumed))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_long_tables_are_folded() -> None:
    rows = [layers.LayerChange(f"w{i}", (2, 2), (1, 2), i, 1, 0.5) for i in range(60)]
    rows[0] = replace(rows[0], after=None, kept=0.0)
    assert layers.table(rows, verbose=True).row_count == 60
    folded = layers.table(rows, verbose=False)
    assert folded.row_count == 40
    assert list(folded.columns[0].cells) == [f"w{i}" for i in range(20, 60)]  # those with the most MACs, in order
    assert "20 smaller ones" in str(folded.caption)


@pytest.mark.parametrize("size", [1, 3, 512, 4096])
def test_bar_codes_show_the_share_kept(size: int) -> None:
    kept = list(range(0, size, 2))
    code = plots._bar_code(size, kept)
    assert code.mean() == pytest.approx(len(kept) / size)
    assert (code.min(), code.max()) == ((1, 1) if size == 1 else (0, 1) if size <= 512 else (0.5, 0.5))


def test_pictures_of_what_was_kept(tmp_path: Path) -> None:
    axes = {f"a{i}": KeptAxis("channels", 8, (1, 5)) for i in range(3)}
    branch = KeptAxis("branch", 1, (0,))
    heights = []
    for kept in (axes, axes | {"b": branch}, axes | {"b": branch, "c": replace(branch, kept=())}):
        plots.plot_kept(tmp_path / "kept.png", kept)
        with Image.open(tmp_path / "kept.png") as image:
            heights.append(image.height)
    assert heights[0] == heights[1] < heights[2]  # branches only where one is gone
    many = {f"a{i}": axes["a0"] for i in range(400)}
    plots.plot_kept(tmp_path / "kept.png", many)
    with Image.open(tmp_path / "kept.png") as image:
        assert image.height <= 4500


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


def onnx_answers(path: str | Path, inputs: Tensor) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, {name: inputs.numpy()}), strict=True))


def test_export(net: nn.Module, weights: Path, cli: Any) -> None:
    outcome = cli("export NET static.onnx --input-shape 1,8,8 --json")
    assert outcome.status == 0, outcome.err
    report = outcome.report
    assert report["onnx"] == "static.onnx"
    assert report["check"]["bytes"] == Path("static.onnx").stat().st_size
    assert set(report["check"]["max_error"]) == {"1", "3", "64"}
    images = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(torch.from_numpy(onnx_answers("static.onnx", images)["logits"]), net(images))
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
    test = make_data().test
    answers = onnx_answers(report["onnx"], test.inputs)
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


# --- runs that stop and go on --------------------------------------------------------------------------------------


def test_an_interrupted_recipe_goes_on_at_the_unfinished_step(
    weights: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"model: net.pt\narch: {ARCH}\ndata: {DATA}\nsteps: [{{prune: {{macs: 0.6}}}}, {{convert: {{epochs: 1}}}}]"
    Path("r.yaml").write_text(text)

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    changes = "--set convert.exits=1 --set convert.macs=0.9"
    with monkeypatch.context() as patch:
        patch.setattr(steps, "convert", interrupt)
        outcome = cli(f"run r.yaml {changes}")
    assert outcome.status == 130
    assert "Traceback" not in outcome.err
    *_, line = outcome.err.splitlines()
    assert line.endswith(f"continue with dyncompress run r.yaml {changes} --out runs/run-net-1 --resume")

    monkeypatch.setattr(steps, "prune", interrupt)  # done already: not to be called again
    assert "holds another run" in cli("run r.yaml --out runs/run-net-1 --resume").line
    outcome = cli(f"run r.yaml {changes} --resume --json")
    assert outcome.status == 0, outcome.err
    assert set(outcome.report) >= {"static", "pruned", "dynamic"}
    assert outcome.report["run_dir"] == "runs/run-net-1"


def test_an_interrupted_training_ends_as_if_it_had_not_been(
    weights: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "convert NET DATA --exits 1 --epochs 2 --macs 0.9 --json"
    whole = cli(f"{command} --out whole")
    save = Store.save

    def save_and_stop(store: Store, state: dict[str, Any]) -> None:
        save(store, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", save_and_stop)
        assert cli(f"{command} --out halves").status == 130
    resumed = cli(f"{command} --out halves --resume")
    models = [checkpoint.load(outcome.report["model"]) for outcome in (whole, resumed)]
    for ours, theirs in zip(*(model.state_dict().values() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert resumed.report["dynamic"]["exits"] == whole.report["dynamic"]["exits"]


def start(command: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "dyncompress", *words(command)],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores Ctrl-C
    )


def test_ctrl_c_and_resume_in_a_process_of_its_own(weights: Path) -> None:
    folder = Path.cwd()
    command = "convert NET DATA --exits 1 --epochs 4000 --macs 0.9 --out run --json"
    process = start(command, folder)
    state = Path("run/steps/1-convert/training.pt")
    patience = time.monotonic() + 60
    while not state.exists() and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert "--out run --json --resume" in err.splitlines()[-1]
    assert state.exists()


def test_help_is_quick_and_needs_no_torch() -> None:
    ask, check = "run(['convert', '--help'])", "assert 'torch' not in sys.modules"
    code = f"import sys; from dyncompress.cli.main import run; {ask}; {check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--exits" in done.stdout
    assert "--max-loss" in done.stdout


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("", ""),
        ("convert", "MODEL"),
        ("squeeze net.pt", "squeeze"),
        ("convert NET DATA --exists 3", "--exists"),
        ("convert NET DATA --exits 0", "exits=0"),
        ("convert NET DATA --rule luck", "luck"),
        ("convert NET DATA --epochs many", "many"),
        ("convert NET DATA --exits 1 --epochs 0", "epochs"),
        ("convert NET DATA --max-loss 2", "max_loss"),
        ("convert NET", "--data"),
        ("convert net.pt DATA", "--arch"),
        ("convert nothing.pt DATA", "there is no file nothing.pt"),
        ("convert . DATA", "is a directory"),
        ("convert zoo:nothing DATA", "vgg-digits"),
        ("convert NET --data nothing", "unknown data source 'nothing'"),
        ("convert NET --data npz:nothing.npz", "nothing.npz"),
        (f"convert NET --data {__name__}:make_rgb_data", "does not take the samples"),
        (f"convert NET --data {__name__}:make_many_classes", "12 classes"),
        ("convert NET DATA --device abacus", "abacus"),
        ("convert NET DATA --input-shape 1,a", "--input-shape"),
        ("prune NET DATA", "ratio, macs, params, bytes, latency"),
        ("prune NET DATA --macs 2", "macs"),
        ("prune NET --importance taylor --ratio 0.5", "--data"),
        ("prune NET --ratio 0.5", "--input-shape"),
        ("prune NET DATA --ratio 0.5 --ignore nothing", "nothing"),
        ("prune NET --importance activation --ratio 0.5", "--data"),
        ("prune NET DATA --importance luck --ratio 0.5", "luck"),
        ("prune NET DATA --ratio 0.5 --scope town", "town"),
        ("prune NET DATA --ratio 0.5 --steps 0", "steps"),
        ("prune NET DATA --latency 0.5 --latency-batch 0", "at least one sample"),
        ("bench", "MODEL"),
        ("run nothing.yaml", "nothing.yaml"),
        ("run outside.yaml", "'../x.onnx' is not the plain name"),
        (f"inspect {__name__}:make_branching --input-shape 1,8,8", "if x.sum() > 0"),
    ],
)
def test_mistakes_end_in_one_line(command: str, says: str, weights: Path, cli: Any) -> None:
    Path("outside.yaml").write_text(f"model: {ARCH}\nsteps: [export: {{onnx: ../x.onnx}}]")
    outcome = cli(command)
    if command == "":
        assert outcome.status == 0
        assert "Usage" in outcome.out
        return
    assert outcome.status == 2, outcome.err
    assert says in outcome.line


def test_a_wrong_request_leaves_no_folder(weights: Path, cli: Any) -> None:
    assert "exits=9" in cli("convert NET DATA --exits 9 --out fresh").line
    assert not Path("fresh").exists()


def test_taken_folders(weights: Path, cli: Any) -> None:
    command = "prune NET DATA --ratio 0.5"
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep me")
    assert "not empty" in cli(f"{command} --out mine").line
    assert "no run to resume" in cli(f"{command} --out mine --resume").line
    assert "is a file" in cli(f"{command} --out net.pt").line
    assert cli(f"{command} --out mine --overwrite").status == 0
    assert Path("mine/notes.txt").read_text() == "keep me"
    assert cli(f"{command} --out mine --overwrite --seed 1").status == 0
    assert "seed: 1" in Path("mine/recipe.yaml").read_text()
    assert "holds another run ('seed: 1' there, 'seed: 2' here)" in cli(f"{command} --out mine --resume --seed 2").line


def test_dynamic_models_are_not_converted_again(weights: Path, cli: Any) -> None:
    assert cli("convert NET DATA --exits 1 --epochs 1 --macs 0.9 --out d").status == 0
    assert "dynamic already" in cli("convert d/model.dyn.safetensors DATA").line
    assert "dynamic already" in cli("prune d/model.dyn.safetensors DATA --ratio 0.5").line
    report = cli("bench d/model.dyn.safetensors NET DATA --json").report
    assert [set(entry) & {"mean_macs", "macs"} for entry in report["models"]] == [{"mean_macs"}, {"macs"}]
    assert cli("inspect d/model.dyn.safetensors --json").report["exits"]


class Trap:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("sprung"),)


def test_a_pickle_is_not_opened(weights: Path, cli: Any) -> None:
    torch.save(Trap(), "trap.pt")
    Path("trap.pkl").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pt", "trap.pkl"):
        assert "--allow-pickle" in cli(f"convert {name} DATA").line
        assert not Path("sprung").exists()


def test_damaged_weights(weights: Path, cli: Any) -> None:
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cut short or damaged" in cli("convert NET DATA").line
    net = Net()
    with torch.no_grad():
        net.fc.bias[0] = float("inf")
    torch.save(net.state_dict(), weights)
    assert "fc.bias holds NaN or infinite" in cli("convert NET DATA").line


def test_defects_are_one_line_too(weights: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("something\nlong")

    monkeypatch.setattr(job, "measure", fail)
    outcome = cli("prune NET DATA --ratio 0.5")
    assert outcome.status == 1
    assert "ZeroDivisionError: something (set DYNCOMPRESS_TRACEBACK=1" in outcome.err
    monkeypatch.setenv("DYNCOMPRESS_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli("prune NET DATA --ratio 0.5")


# --- defaults that must not drift apart ----------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "function"), [(Convert(), steps.convert), (Prune(), steps.prune)])
def test_steps_have_the_defaults_of_their_functions(step: Any, function: Any) -> None:
    import inspect

    parameters = inspect.signature(function).parameters
    assert vars(step) == {name: parameters[name].default for name in vars(step)}


def test_folder_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def choose(resume: bool) -> str:
        return folders.choose_folder("convert", "a b", None, resume=resume, overwrite=False).name

    assert choose(resume=True) == choose(resume=False) == "convert-a-b-1"
    (tmp_path / "runs" / "convert-a-b-9").mkdir(parents=True)
    (tmp_path / "runs" / "convert-a-b-x").mkdir()
    assert choose(resume=False) == "convert-a-b-10"
    assert choose(resume=True) == "convert-a-b-9"
