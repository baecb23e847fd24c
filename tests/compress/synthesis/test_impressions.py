"""Inputs synthesised out of a small network, against formulas by hand, and conversion without data end to end."""

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import stripes
from flat_options import flat
from PIL import Image
from torch import Tensor, fx, nn
from torch.utils.data import TensorDataset
from trained import QUIET

import dyncompress as dc
from dyncompress.cli.main import _one_line_warnings, run
from dyncompress.compress.evaluation.evaluate import evaluate
from dyncompress.compress.exits.convert import convert
from dyncompress.compress.synthesis.data_free import splits_of_impressions
from dyncompress.compress.synthesis.few_samples import Blends, few_shots
from dyncompress.compress.synthesis.impressions import FILE, Synthesis, make_impressions
from dyncompress.compress.synthesis.norm_statistics import mismatch
from dyncompress.compress.training.trainer import fit
from dyncompress.errors import RequestError
from dyncompress.passes.capture.capture import capture

SHORT = Synthesis(count=48, batch_size=24)
X = torch.zeros(2, 1, 8, 8)


def bright_stripes(count: int, seed: int) -> TensorDataset:
    """Not around 0, as the noise is that impressions begin from."""
    x, y = stripes(count, seed, 0.8).tensors
    return TensorDataset(1 + x, y)


@cache
def trained() -> nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in ((1, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    flat(fit)(model, nn.functional.cross_entropy, bright_stripes(480, 0), epochs=12, lr=0.02, batch_size=48, **QUIET)
    return model.eval()


def captured() -> fx.GraphModule:
    return capture(trained(), X)


@cache
def impressions() -> Any:
    return flat(make_impressions)(captured(), X, SHORT, **QUIET)


def distances(x: Tensor) -> Tensor:
    """Per batch norm, how far means and variances of its input are from the running ones, in a plain loop."""
    found, y = [], x
    with torch.no_grad():
        for layer in trained():  # type: ignore[attr-defined]
            if isinstance(layer, nn.BatchNorm2d):
                rows = y.transpose(0, 1).flatten(1).double().numpy()
                mean, deviation = layer.running_mean.numpy(), np.sqrt(layer.running_var.numpy())
                found.append(np.mean(((rows.mean(1) - mean) / deviation) ** 2 + (rows.std(1) / deviation - 1) ** 2))
            y = layer(y)
    return torch.tensor(np.array(found))


def test_the_mismatch_is_the_formula_and_so_is_its_gradient() -> None:
    norm = captured().get_submodule("4")
    x = torch.randn(5, 16, 3, 4, dtype=torch.double, requires_grad=True)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    sigma = (norm.running_var + norm.eps).sqrt()
    wanted = (((mean - norm.running_mean) / sigma) ** 2 + ((variance + norm.eps).sqrt() / sigma - 1) ** 2).mean()
    (gradient,) = torch.autograd.grad(wanted, x)
    found = mismatch(norm, x)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, x)[0], gradient, rtol=1e-3, atol=1e-6)


def test_impressions_have_the_statistics_of_the_data() -> None:
    x, noise = impressions().inputs, torch.randn(48, 1, 8, 8)
    data = bright_stripes(48, 1).tensors[0]
    assert (distances(x) < 0.5 * distances(noise)).all()
    assert distances(x).mean() < 0.2 * distances(noise).mean()
    assert distances(data).mean() < 0.1  # so that the distances mean something


def test_the_network_answers_the_classes() -> None:
    made = impressions()
    assert made.inputs.shape == (48, 1, 8, 8)
    assert made.classes.tolist() == [k % 3 for k in range(48)]
    with torch.no_grad():
        answers = trained()(made.inputs).softmax(-1)
        noise = trained()(torch.randn(48, 1, 8, 8)).softmax(-1)
    of_class = torch.arange(48), made.classes
    assert float(answers[of_class].min()) > 0.7 and float(noise[of_class].mean()) < 0.6


def test_an_interrupted_synthesis_resumes_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = Synthesis(count=40, batch_size=10, steps=2)
    whole = flat(make_impressions)(captured(), X, how, seed=5, run_dir=tmp_path / "whole", **QUIET)
    saved, calls = torch.save, []

    def interrupted(*args: Any) -> None:
        saved(*args)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", interrupted)
        flat(make_impressions)(captured(), X, how, seed=5, run_dir=tmp_path / "cut", **QUIET)
    for options, message in (({}, "holds a run already"), ({"resume": True, "seed": 6}, "seed = 5, not 6")):
        with pytest.raises(RequestError, match=message):
            flat(make_impressions)(captured(), X, how, run_dir=tmp_path / "cut", **{"seed": 5, **options, **QUIET})
    with monkeypatch.context() as patch:
        counted: list[Any] = []
        patch.setattr(torch, "save", lambda *args: (counted.append(1), saved(*args)))
        resumed = flat(make_impressions)(captured(), X, how, seed=5, run_dir=tmp_path / "cut", resume=True, **QUIET)
    assert len(counted) == 3  # the second batch never reached its place
    for name in ("inputs", "classes"):
        assert torch.equal(getattr(whole, name), getattr(resumed, name))
    assert (tmp_path / "cut" / FILE).exists()


def test_blends_lie_between_two_inputs() -> None:
    inputs = torch.eye(4)
    blends = Blends(inputs, (torch.zeros(1, 4),), size=40)
    assert len(blends) == 40
    for index in range(40):
        (x,), label = blends[index]
        assert label == -1 and float(x.sum()) == pytest.approx(1)
        assert float(x[index % 4]) >= 0.5 and int((x > 0).sum()) <= 2
    torch.manual_seed(0)
    image = torch.arange(400.0).view(1, 1, 20, 20)
    shifts = {int(Blends(image, image)[0][0][0, 0, 0]) for _ in range(300)}
    assert shifts == {(20 * (-i % 20)) + (-j % 20) for i in range(-2, 3) for j in range(-2, 3)}


def test_shots_are_as_many_of_every_class() -> None:
    labels = torch.tensor([0] * 30 + [1] * 5 + [2] * 9 + [-1] * 20)
    data = TensorDataset(torch.arange(64.0), labels)
    for shots in (1, 5):
        few = few_shots(data, shots, 3, seed=1)
        assert sorted(int(few[k][1]) for k in range(len(few))) == sorted([0, 1, 2] * shots)
        assert len({float(few[k][0]) for k in range(len(few))}) == 3 * shots
    other = few_shots(data, 5, 3, seed=2)
    assert {float(other[k][0]) for k in range(15)} != {float(few[k][0]) for k in range(15)}
    with pytest.raises(RequestError, match="5 samples of class 1, not 6"):
        few_shots(data, 6, 3, seed=1)


def accuracies(model: Any) -> list[float]:
    x, y = bright_stripes(300, 7).tensors
    with torch.no_grad():
        return [float((z.argmax(-1) == y).float().mean()) for z in model.all_logits(x)]


def test_exits_are_distilled_without_data() -> None:
    with pytest.warns(UserWarning, match="without data"):
        model = flat(convert)(trained(), X, exits=2, impressions=256, epochs=2, max_loss=0.05, **QUIET)
    static = evaluate(trained(), bright_stripes(300, 7)).accuracy
    result = evaluate(model, bright_stripes(300, 7))
    assert accuracies(model)[-1] == pytest.approx(static)
    assert accuracies(model)[1] > static - 0.06
    assert result.accuracy > 0.6  # two of three classes: thresholds found on impressions promise nothing
    assert result.mean_macs < 0.99 * model.static_macs  # type: ignore[operator]


def test_thresholds_are_chosen_on_impressions_held_out_as_they_are_and_blended() -> None:
    made = flat(make_impressions)(captured(), X, Synthesis(count=60, batch_size=60), seed=3, **QUIET).inputs
    _, calibration = splits_of_impressions(
        captured(), X, 60, run=dc.Run(seed=3, device=torch.device("cpu"), progress=False)
    )
    assert len(calibration) == 96  # 12 held out, four times as they are and four times blended
    shown, labels = (
        torch.stack(column) for column in zip(*((x, torch.tensor(y)) for x, y in calibration), strict=True)
    )
    assert torch.equal(shown[:48], made[-12:].repeat(4, 1, 1, 1))  # on 8 x 8 nothing is shifted
    blended = shown[48:].flatten(1)
    same = sum(any(torch.equal(row, other) for other in shown[:48].flatten(1)) for row in blended)
    assert same < 12  # one in twelve meets itself
    with torch.no_grad():
        assert torch.equal(trained()(shown).argmax(-1), labels)


def test_exits_learn_from_a_few_shots() -> None:
    class Part:
        train, calibration = bright_stripes(600, 3), bright_stripes(120, 4)

    model = flat(convert)(trained(), exits=2, data=Part(), shots=2, epochs=2, **QUIET)
    assert accuracies(model)[1] > accuracies(model)[-1] - 0.06
    plain = flat(convert)(trained(), exits=2, data=Part(), shots=5, epochs=1, recipe="sum", **QUIET)  # needs labels
    assert plain.trunk.meta["info"]["convert"]["samples"] == 120


def unsound(model: nn.Module) -> nn.Module:
    next(model.parameters()).data.fill_(torch.nan)
    return model


@pytest.mark.parametrize(
    ("model", "x", "options", "message"),
    [
        (trained, X, {"risk": 0.01}, "no promise"),
        (trained, X, {"recipe": "sum"}, "learns from labels"),
        (trained, X, {"freeze_trunk": False}, "frozen"),
        (trained, X, {"shots": 3}, "give data"),
        (trained, X, {"impressions": 2}, "impressions is 2"),
        (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2)), torch.ones(2, 3).long(), {}, "ids"),
        (lambda: nn.Linear(4, 1), torch.zeros(2, 4), {}, "answers 1 per sample"),
        (
            lambda: unsound(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))),
            torch.zeros(2, 4),
            {},
            "not finite",
        ),
        (lambda: nn.Bilinear(4, 4, 3), (torch.zeros(2, 4), torch.zeros(2, 4)), {}, "one tensor, not of 2"),
    ],
)
def test_what_cannot_be_done_without_data(model: Any, x: Any, options: dict[str, Any], message: str) -> None:
    with warnings.catch_warnings(), pytest.raises(RequestError, match=message):
        warnings.simplefilter("ignore")
        flat(convert)(model(), x, exits=1, **{**QUIET, **options})


def make_net() -> nn.Module:
    return trained()


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    command = f"convert {__name__}:make_net --input-shape 1,8,8 --exits 2 --impressions 140 --epochs 1 --json"
    with pytest.warns(UserWarning, match="without data"):
        assert run(command.split()) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["static"]["accuracy"] is None
    folder = Path(report["run_dir"])
    with Image.open(folder / "impressions.png") as picture:
        assert picture.size == (680, 204)  # ten inputs of 64 pixels and a gap of 4 across, three classes down
    assert not (folder / "steps").exists()
    assert run([*command.split(), "--risk", "0.1"]) == 2
    assert "no promise" in capfd.readouterr().err
    with _one_line_warnings():
        assert warnings.formatwarning("two\nlines", UserWarning, "file.py", 1) == "warning: two lines\n"  # type: ignore
