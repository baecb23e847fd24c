"""Exits on the command line: files whose thresholds can be set, fallbacks, and data with a label per position."""

from pathlib import Path

import pytest
import torch
from cases import CASES, call
from command_line import reported
from dynamic_models import leaning
from nets import TwoInputs
from onnx_files import run as run_onnx
from onnx_files import session
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dyncompress as dc
from dyncompress.cli.main import run
from dyncompress.errors import RequestError
from dyncompress.model_zoo.load_data import load_data
from dyncompress.runtime.predict.policy import ExitPolicy


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.set_num_threads(1)


def test_an_exported_files_thresholds_can_be_set(capfd: pytest.CaptureFixture[str]) -> None:
    model, batch = leaning("two-inputs", ExitPolicy("max-softmax", (0.9, 0.7))), CASES["two-inputs"].batch(40)
    dc.save(model, "model.dyn")
    report = reported(capfd, "export", "model.dyn", "model.onnx", "--tunable")
    assert report["check"]["inputs"] == ["x", "late", "threshold_0", "threshold_1"]
    file = session(report["onnx"])
    seen = []
    for thresholds in (None, (0.0, 0.5), (1.0, 0.0), (0.95, 1.0)):
        got = run_onnx(file, batch, **{f"threshold_{k}": value for k, value in enumerate(thresholds or ())})
        exits = []
        for first, second in zip(*(z.softmax(-1).amax(-1) for z in call(model.all_logits, batch)[:-1]), strict=True):
            a, b = thresholds or (0.9, 0.7)
            exits.append(0 if first >= a else 1 if second >= b else 2)
        assert got["exit_index"].tolist() == exits
        seen.append(exits)
    assert seen[1] == [0] * 40 and seen[2] == [1] * 40 and len({tuple(s) for s in seen}) == 4


# --- a label per position ----------------------------------------------------------------------------------------


def make_pair(label: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """Token ids (N, 6) and a class of each token, but for the first one, which counts for nothing."""
    ids = torch.randint(0, 20, (120, 6), generator=torch.Generator().manual_seed(0))
    labels = ids % 3 + label
    labels[:, 0] = -100
    return TensorDataset(ids[:80], labels[:80]), TensorDataset(ids[80:], labels[80:])


def make_negative() -> tuple[TensorDataset, TensorDataset]:
    return make_pair(-1)


def make_floats() -> tuple[TensorDataset, TensorDataset]:
    return tuple(TensorDataset(x, y.float()) for x, y in (d.tensors for d in make_pair()))  # type: ignore[return-value]


def test_a_pair_with_a_label_per_position() -> None:
    splits = load_data(f"{__name__}:make_pair")
    sizes = [len(part) for _, part in splits.items()]  # type: ignore[arg-type]
    assert sum(sizes[:2]) == 80 and 12 <= sizes[1] <= 13 and sizes[2] == 40 and splits.classes == 3
    rows = {tuple(part[i][0].tolist()) for part in (splits.train, splits.calibration) for i in range(len(part))}  # type: ignore[arg-type]
    assert rows == {tuple(row.tolist()) for row in make_pair()[0].tensors[0]}
    with pytest.raises(RequestError, match="label -1 is out of range: labels start at 0"):
        load_data(f"{__name__}:make_negative")
    with pytest.raises(RequestError, match="is no whole number"):
        load_data(f"{__name__}:make_floats")


@pytest.mark.filterwarnings("ignore:the model answers at every position")
def test_exits_of_a_tagger_on_data_of_ones_own(capfd: pytest.CaptureFixture[str]) -> None:
    data = f"{__name__}:make_pair"
    words = (
        "convert",
        "nets:Tagger",
        "--data",
        data,
        "--exits",
        "1",
        "--epochs",
        "1",
        "--batch-size",
        "16",
    )
    report = reported(capfd, *words)
    model = dc.load(report["model"])
    ids, labels = make_pair()[1].tensors
    out = model.predict(ids)
    counted = labels != -100
    wanted = (out.logits.argmax(-1) == labels)[counted].double().mean()
    assert report["dynamic"]["accuracy"] == pytest.approx(float(wanted))


# --- fallback ----------------------------------------------------------------------------------------------------


def make_two() -> nn.Module:
    torch.manual_seed(3)
    return Narrow()


class Narrow(nn.Module):
    """One input, as sources of one's own have it."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = TwoInputs()

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x, x[:, 0])


def make_points() -> tuple[TensorDataset, TensorDataset]:
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, make_two()(x).argmax(-1))
    return data, data


def test_the_ensemble_may_be_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    words = ("convert", f"{__name__}:make_two", "--data", f"{__name__}:make_points", "--exits", "2", "--epochs", "1")
    report = reported(capfd, *words, "--fallback", "ensemble", "--threshold-search", "quota", "--macs", "0.9")
    model = dc.load(report["model"])
    assert model.policy.fallback == "ensemble"
    x, labels = make_points()[1].tensors
    right = (model.predict(x).logits.argmax(-1) == labels).double().mean()
    assert report["dynamic"]["accuracy"] == pytest.approx(float(right))


def test_thresholds_by_measured_time(capfd: pytest.CaptureFixture[str]) -> None:
    words = ("convert", f"{__name__}:make_two", "--data", f"{__name__}:make_points", "--exits", "2", "--epochs", "1")
    report = reported(capfd, *words, "--cost", "latency", "--latency-batch", "4", "--max-loss", "0.5")
    costs = report["exit_costs"]
    assert costs["batch"] == 4 and len(costs["stages_ms"]) == 3 and len(costs["heads_ms"]) == 2
    assert 0 < costs["mean_ms"] <= sum(costs["stages_ms"]) + sum(costs["heads_ms"]) and costs["static_ms"] > 0
    assert "thresholds by ms per sample at batch 4" in (Path(report["run_dir"]) / "table.txt").read_text()
    assert run([*words, "--latency", "0.001"]) == 2
    assert "within 0.001 of the static model's milliseconds, the least is" in capfd.readouterr().err
