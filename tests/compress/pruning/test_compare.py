"""Structured, low-rank and unstructured models side by side: sizes by hand, zeros held, the command, resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_options import flat
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompress as dc
from dyncompress.cli.main import run
from dyncompress.compress.pruning import after_cut
from dyncompress.compress.pruning import compare as comparing
from dyncompress.model_zoo.load_data import ArrayDataset, Splits

HERE = Path(__file__)


class Net(nn.Module):
    """Images (B, 1, 8, 8) in 2 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.wide, self.fc = nn.Conv2d(16, 32, 3, stride=2), nn.Linear(288, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.wide(F.relu(self.norm(self.conv(x))))).flatten(1))


class Reader(nn.Module):
    """Rows of images in 2 classes; only its small head has a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(8, 24, batch_first=True), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x.squeeze(1))[0][:, -1])


def images(count: int, seed: int) -> ArrayDataset:
    """Class 1 has a bright upper half."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    x = torch.randn(count, 1, 8, 8, generator=generator)
    x[:, :, :4] += labels[:, None, None, None].float()
    return ArrayDataset(x, labels)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def make_data() -> Splits:
    return Splits(images(96, 0), images(32, 1), images(64, 2), classes=2, name="halves")


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "_REPEATS", 2)


NAMES = ["static", "structured-0.5", "low-rank-0.5", "unstructured-0.5", "unstructured-0.5-sparse"]


def test_every_method_keeps_the_same_share_of_the_parameters() -> None:
    net, data = make_net(), make_data()
    found = dc.compare(
        net,
        data.train,
        data.test,
        shares=[0.5],
        finetune=4,
        training=dc.Training(lr=1e-2, batch_size=16),
        run=dc.Run(device="cpu"),
    )
    assert list(found.entries) == NAMES and list(found.models) == NAMES[:-1] and not found.left_out
    whole = sum(p.numel() for p in net.parameters())
    held = {name: sum(p.numel() for p in model.parameters()) for name, model in found.models.items()}
    assert {name: entry.parameters for name, entry in found.entries.items()} == {
        **held, "unstructured-0.5-sparse": whole - round(0.5 * whole)
    }  # fmt: skip
    assert held["static"] == held["unstructured-0.5"] == whole
    assert all(0.5 - 180 / whole <= held[name] / whole <= 0.5 for name in NAMES[1:3])  # a channel or rank of wide
    zeros = sum(int((p == 0).sum()) for n, p in found.models["unstructured-0.5"].named_parameters() if "weight" in n)
    assert zeros == round(0.5 * whole)  # held while it was trained
    macs = {name: entry.macs for name, entry in found.entries.items()}
    assert macs["static"] == macs["unstructured-0.5"] == 64 * 16 * 9 + 9 * 32 * 144 + 288 * 2
    assert max(macs["structured-0.5"], macs["low-rank-0.5"], macs["unstructured-0.5-sparse"]) < macs["static"]
    assert found.entries["unstructured-0.5"].accuracy == found.entries["unstructured-0.5-sparse"].accuracy
    for name, model in found.models.items():
        with torch.no_grad():
            right = (model.eval()(data.test.inputs).argmax(1) == data.test.labels).float().mean()
        assert found.entries[name].accuracy == pytest.approx(float(right))
        assert found.entries[name].latency_ms["1"] > 0
    assert min(found.entries[name].accuracy or 0 for name in NAMES[1:]) > 0.6  # they were trained


def test_what_cannot_reach_a_share_is_left_out_with_the_reason() -> None:
    data = make_data()
    found = dc.compare(Reader(), data.train, data.test, shares=[0.5], finetune=0, run=dc.Run(device="cpu"))
    assert list(found.entries) == [NAMES[0], NAMES[1], NAMES[3], NAMES[4]]
    assert list(found.left_out) == ["low-rank-0.5"] and "out of reach" in found.left_out["low-rank-0.5"]


def test_mistakes_are_one_line() -> None:
    data = make_data()
    for options, message in (
        ({"shares": ()}, "shares are the parts"),
        ({"shares": (0.5, 1.0)}, "shares are the parts"),
        ({"finetune": -1}, "finetune is a number of epochs"),
        ({"shares": (0.0001,)}, "no method reaches any share"),
    ):
        with pytest.raises(dc.RequestError, match=message):
            flat(dc.compare)(make_net(), data.train, data.test, device="cpu", **options)  # type: ignore[arg-type]


def command(*more: str) -> list[str]:
    return ["compare", f"{__name__}:make_net", "--data", f"{__name__}:make_data", "--device", "cpu", *more]


def test_the_command_leaves_a_report_a_picture_and_models(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(command("--shares", "0.5", "0.4", "--finetune", "0", "--out", "run", "--json")) == 0
    report: dict[str, Any] = json.loads(capfd.readouterr().out)
    names = [*NAMES, *(name.replace("0.5", "0.4") for name in NAMES[1:])]
    assert [name for name, value in report.items() if isinstance(value, dict) and "latency_ms" in value] == names
    assert report["onnx"] is None and report["left_out"] == {} and report["run_dir"] == "run"
    assert json.loads(Path("run/report.json").read_text()) == report
    files = {path.name for path in Path("run").iterdir()}
    saved = {f"{name}.safetensors" for name in names if name != "static" and not name.endswith("-sparse")}
    assert files == {"recipe.yaml", "report.json", "table.txt", "compare.png", *saved}
    small = dc.load(report["low-rank-0.4"]["model"])
    found = dc.evaluate(small, make_data().test)
    assert found.accuracy == report["low-rank-0.4"]["accuracy"] and found.mean_macs == report["low-rank-0.4"]["macs"]
    assert (
        run(command("--shares", "0.5", "0.4", "--finetune", "0", "--out", "run")) == 2
        and "not empty" in capfd.readouterr().err
    )
    assert run(command("--shares", "0.5", "0.4", "--finetune", "0", "--out", "run", "--resume", "--json")) == 0
    assert json.loads(capfd.readouterr().out) == report  # nothing is done again


def test_an_interrupted_comparison_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    straight = command("--shares", "0.5", "--finetune", "2", "--out", "straight")
    assert run(straight) == 0
    fit, seen = after_cut.fit, list[Path]()

    def stopped(model: nn.Module, loss_fn: Any, data: Any, training: dc.Training, run: dc.Run, **options: Any) -> Any:
        seen.append(Path(str(run.run_dir)))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return fit(model, loss_fn, data, training, run, **options)

    monkeypatch.setattr(after_cut, "fit", stopped)
    halted = [word.replace("straight", "halted") for word in straight]
    assert run(halted) == 130 and "--resume" in capfd.readouterr().err
    assert (seen[0] / "training.pt").exists()
    assert run([*halted, "--resume"]) == 0
    for name in NAMES[1:-1]:
        one, other = (dc.load(Path(folder) / f"{name}.safetensors") for folder in ("straight", "halted"))
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), (name, key)
    changed = [word if word != "0.5" else "0.25" for word in halted]
    assert run([*changed, "--resume"]) == 2 and "holds another run" in capfd.readouterr().err


def test_no_data_is_a_mistake(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["compare", f"{__name__}:make_net", "--input-shape", "1,8,8", "--out", str(tmp_path / "none")]
    assert run(words) == 2
    assert "give labelled data" in capfd.readouterr().err and not (tmp_path / "none").exists()
