"""One line for every mistake, and for every defect."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ARCH
from nets import ConvNet
from torch import Tensor, nn

from dyncompress.cli.runs import run_recipe as job
from dyncompress.model_zoo.load_data import ArrayDataset, Splits


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x.mean((2, 3))
        return x.amax((2, 3))


def make_branching() -> nn.Module:
    return Branching()


def make_rgb_data() -> Splits:
    rgb = ArrayDataset(torch.rand(12, 3, 8, 8), torch.arange(12) % 3)
    return Splits(rgb, rgb, rgb, classes=3, name="rgb")


def make_many_classes() -> Splits:
    many = ArrayDataset(torch.rand(12, 1, 8, 8), torch.arange(12))
    return Splits(many, many, many, classes=12, name="many")


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
    net = ConvNet()
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
