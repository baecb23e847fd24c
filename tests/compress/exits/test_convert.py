"""convert end to end on small models: accuracy kept, MACs saved, and what every option promises."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from data import digits
from flat_options import flat
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from trained import QUIET, accuracy_and_macs, info, on_digits

import dyncompress as dc
from dyncompress.compress.evaluation.evaluate import evaluate
from dyncompress.compress.exits.convert import convert
from dyncompress.compress.thresholds.choose_policy import choose_policy
from dyncompress.errors import RequestError
from dyncompress.runtime.files.checkpoint import load, save
from dyncompress.runtime.predict.dynamic import DynamicModel


@cache
def converted() -> DynamicModel:
    return flat(convert)(on_digits(), exits=2, data=digits(), epochs=4, batch_size=64, **QUIET)


def test_keeps_the_accuracy_and_saves_work() -> None:
    static, model = on_digits(), converted()
    assert not model.training
    before, after = evaluate(static, digits().calibration), accuracy_and_macs(model, digits().calibration)
    report = info(model)
    assert report["static"] == {"accuracy": pytest.approx(before.accuracy), "macs": model.static_macs}
    assert after == pytest.approx((report["dynamic"]["accuracy"], report["dynamic"]["mean_macs"]))
    assert after[0] >= before.accuracy - 0.005 - 1e-9
    assert after[1] < 0.8 * model.static_macs
    assert evaluate(model, digits().test).accuracy > evaluate(static, digits().test).accuracy - 0.04


def test_the_report_is_plain_and_survives_a_checkpoint(tmp_path: Path) -> None:
    model = converted()
    report = info(model)
    assert [e["epoch"] for e in report["history"]] == [1, 2, 3, 4]
    assert [e["at"] for e in report["exits"]] == [*model.exits, "output"]
    assert sum(e["share"] for e in report["exits"]) == pytest.approx(1)
    assert all(e["ece_after"] <= e["ece_before"] + 0.02 for e in report["exits"])
    assert [e["temperature"] for e in report["exits"][:-1]] == list(model.policy.temperatures)
    costs = [p["mean_macs"] for p in report["curve"]]
    assert costs == sorted(costs) and len(costs) > 3
    save(model, tmp_path / "model.dyn.safetensors")
    loaded = load(tmp_path / "model.dyn.safetensors")
    assert isinstance(loaded, DynamicModel)
    assert info(loaded) == report and loaded.policy == model.policy


def test_a_budget_is_kept_and_can_be_changed_without_training() -> None:
    model = converted()
    whole = model.policy
    try:
        accuracies = []
        for share in (0.4, 0.6, 0.9):
            report = choose_policy(model, digits().calibration, macs=share)
            accuracy, macs = accuracy_and_macs(model, digits().calibration)
            assert macs <= share * model.static_macs
            assert (accuracy, macs) == pytest.approx((report.dynamic.accuracy, report.dynamic.mean_macs))
            accuracies.append(accuracy)
        assert accuracies == sorted(accuracies)
        with pytest.raises(RequestError, match="the least is"):
            choose_policy(model, digits().calibration, macs=0.001)
        report = choose_policy(model, digits().calibration, max_loss=0.05, leaving=dc.Leaving(rule="entropy"))
        accuracy, macs = accuracy_and_macs(model, digits().calibration)
        assert model.policy.rule == "entropy"
        assert accuracy >= report.final.accuracy - 0.05 - 1e-9
        assert macs == pytest.approx(report.dynamic.mean_macs)
    finally:
        model.policy = whole


def test_a_frozen_trunk_stays_bit_for_bit() -> None:
    static = on_digits()
    static[0][0].weight.requires_grad = False  # the user's own choice, not to be undone
    try:
        model = flat(convert)(static, exits=2, data=digits(), epochs=1, batch_size=64, **QUIET)
    finally:
        static[0][0].weight.requires_grad = True
    state = model.trunk.state_dict()
    assert all(torch.equal(state[name], value) for name, value in static.state_dict().items())
    frozen = [name for name, p in model.trunk.named_parameters() if not p.requires_grad]
    assert frozen == ["0.0.weight"]
    x = digits().test[:20][0]  # type: ignore[index]
    torch.testing.assert_close(model(x), static(x))


def test_the_seed_decides_everything() -> None:
    first, again, other = (
        flat(convert)(
            on_digits(), exits=2, data=digits(), epochs=1, batch_size=100, seed=seed, freeze_trunk=False, **QUIET
        )
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert first.policy == again.policy
    assert not torch.equal(*(m.trunk.get_submodule("exits.0").linear.weight for m in (first, other)))


def test_an_interrupted_conversion_resumes_exactly(tmp_path: Path) -> None:
    class Interrupted(Dataset):
        def __init__(self, after: int) -> None:
            self.left = after

        def __len__(self) -> int:
            return len(digits().train)  # type: ignore[arg-type]

        def __getitem__(self, index: int) -> Any:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return digits().train[index]

    def run(after: int, **options: Any) -> DynamicModel:
        data = replace(digits(), train=Interrupted(after))
        return flat(convert)(
            on_digits(),
            torch.zeros(1, 1, 8, 8),
            2,
            data=data,
            epochs=2,
            batch_size=100,
            freeze_trunk=False,
            **options,
            **QUIET,
        )

    with pytest.raises(KeyboardInterrupt, match="after 1 of 2 epochs"):
        run(1500, run_dir=tmp_path)
    resumed, whole = run(-1, run_dir=tmp_path, resume=True), run(-1)
    for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert resumed.policy == whole.policy
    assert [e["loss"] for e in info(resumed)["history"]] == [e["loss"] for e in info(whole)["history"]]


def test_one_plain_data_set_is_divided_and_may_hold_unlabelled_samples() -> None:
    x, y = (t.clone() for t in digits().train.tensors)  # type: ignore[attr-defined]
    y[::5] = -1
    model = flat(convert)(on_digits(), exits=("relu_1",), data=TensorDataset(x, y), epochs=1, batch_size=64, **QUIET)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert info(model)["samples"] == int((y[order[:150]] >= 0).sum())
    assert model.exits == ["relu_1"]


class Tokens(nn.Module):
    """Mean of embeddings, weighted by a mask, through three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)))
        self.classifier = nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        weight = mask.unsqueeze(-1).float()
        x = (self.embed(ids) * weight).sum(1) / weight.sum(1)
        return {"logits": self.classifier(self.layers(x))}


class Sentences(Dataset):
    """The class is which third of the vocabulary the words come from."""

    def __init__(self, as_dict: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(0, 3, (600,), generator=generator)
        self.ids = torch.randint(0, 6, (600, 7), generator=generator) + 6 * self.labels.unsqueeze(1)
        self.as_dict = as_dict

    def __len__(self) -> int:
        return 600

    def __getitem__(self, index: int) -> tuple[Any, int]:
        ids, mask = self.ids[index], torch.arange(7) < 3 + index % 5
        return ({"ids": ids, "mask": mask} if self.as_dict else (ids, mask)), int(self.labels[index])


@pytest.mark.parametrize("as_dict", [True, False])
def test_token_models_with_named_or_positional_inputs(as_dict: bool) -> None:
    torch.manual_seed(0)
    data = Sentences(as_dict)
    model = flat(convert)(
        Tokens(), exits=2, data=data, epochs=8, lr=0.02, trunk_lr=1.0, freeze_trunk=False, batch_size=50, **QUIET
    )
    result = evaluate(model, data)
    assert result.accuracy > 0.95
    assert result.mean_macs is not None and result.mean_macs < 0.9 * model.static_macs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "guess"}, "rule"),
        ({"max_loss": -0.1}, "max_loss"),
        ({"macs": 1.5}, "macs"),
        ({"trunk_lr": -1.0, "freeze_trunk": False}, "trunk_lr"),
        ({"epochs": 0}, "epochs"),
        ({"exits": 50}, "exits=50"),
        ({"data": None, "example_inputs": None}, "example_inputs"),
        ({"data": TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0))}, "empty"),
        ({"data": TensorDataset(torch.zeros(2, 1, 8, 8), torch.zeros(2))}, "too few"),
    ],
)
def test_wrong_requests(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"exits": 2, "data": digits(), **QUIET, **change}
    with pytest.raises(RequestError, match=message):
        flat(convert)(on_digits(), **options)


def test_accuracy_that_cannot_be_kept_is_refused() -> None:
    flipped = TensorDataset(digits().train.tensors[0], (digits().train.tensors[1] + 1) % 10)  # type: ignore[attr-defined]
    data = replace(digits(), train=flipped)
    with pytest.raises(RequestError, match="the best is"):
        flat(convert)(
            on_digits(), exits=1, data=data, epochs=1, lr=0.02, trunk_lr=1.0, freeze_trunk=False, batch_size=64, **QUIET
        )
