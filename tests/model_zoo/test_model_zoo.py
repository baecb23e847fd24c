"""The reference models and the embedded digits: shapes, recorded accuracies, disjoint splits, determinism."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from dyncompress.errors import RequestError
from dyncompress.model_zoo import build, example_input, load, load_data
from dyncompress.model_zoo.data.digits import HELD_OUT_DRAWS, TRAIN_DRAWS, digits, originals
from dyncompress.model_zoo.data.splits import ArrayDataset, Splits, stratified_split
from dyncompress.model_zoo.train import RECIPES, RECORD, Recipe, accuracy, main, train
from dyncompress.model_zoo.zoo import CHECKPOINTS


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_data("digits")


def arrays(data: object) -> ArrayDataset:
    assert isinstance(data, ArrayDataset)
    return data


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_any_batch_size_gives_one_row_of_logits_per_image(name: str) -> None:
    model = load(name)
    x = example_input(name)
    assert x.shape == (2, 1, 32, 32)
    both = model(x)
    assert both.shape == (2, 10)
    torch.testing.assert_close(torch.cat([model(x[:1]), model(x[1:])]), both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_a_loaded_model_is_float32_and_in_eval_mode(name: str) -> None:
    model = load(name)
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert build(name).training


@pytest.mark.parametrize("name", RECIPES)
def test_stored_weights_reach_the_recorded_accuracy(name: str, splits: Splits) -> None:
    record = json.loads((CHECKPOINTS / RECORD).read_text())[name]
    model = load(name).to(memory_format=torch.channels_last)  # in which the images come
    assert accuracy(model, arrays(splits.test)) == pytest.approx(record["test_accuracy"], abs=0.003)


def test_the_package_stays_small() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINTS.iterdir()) < 5.5e6


def test_a_missing_checkpoint_says_how_to_make_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dyncompress.model_zoo.zoo.CHECKPOINTS", tmp_path)
    with pytest.raises(RequestError, match=r"python -m dyncompress\.model_zoo\.train lstm-digits"):
        load("lstm-digits")


# --- digits ---------------------------------------------------------------------------------------------------------


def test_no_original_is_in_two_splits_and_every_class_is_shared_out() -> None:
    parts = originals()
    ids = torch.cat([part.ids for part in parts])
    assert sorted(ids.tolist()) == list(range(1797))
    target = load_digits().target
    for part, share in zip(parts, (0.60, 0.15, 0.25), strict=True):
        assert part.labels.tolist() == target[part.ids.numpy()].tolist()
        per_class = np.bincount(part.labels, minlength=10) / np.bincount(target)
        assert np.abs(per_class - share).max() < 0.02


def test_digits_have_the_promised_sizes_and_range(splits: Splits) -> None:
    sizes = [len(arrays(data)) for _, data in splits.items()]
    kept = [len(part.labels) for part in originals()]
    assert sizes == [kept[0] * TRAIN_DRAWS, kept[1] * HELD_OUT_DRAWS, kept[2] * HELD_OUT_DRAWS]
    x, y = splits.train[0]
    assert x.shape == (1, 32, 32) and x.dtype == torch.float32 and isinstance(y, int)
    assert float(x.min()) >= 0 and 0.5 < float(x.max()) <= 1
    x_batch, y_batch = next(iter(DataLoader(splits.test, batch_size=4)))
    assert x_batch.shape == (4, 1, 32, 32) and y_batch.dtype == torch.int64
    assert splits.classes == 10 and splits.name == "digits"


def test_a_seed_decides_the_distortions_but_not_the_originals(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dyncompress.model_zoo.data.digits.TRAIN_DRAWS", 1)
    again, other = arrays(digits(0).calibration), arrays(digits(1).calibration)
    first = arrays(splits.calibration)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.labels, other.labels)
    assert not torch.equal(first.inputs, other.inputs)


def test_easy_images_still_look_like_their_original(splits: Splits) -> None:
    """A nearest-mean classifier on undistorted digits reads well more than chance, and far from all."""
    train = originals()[0]
    means = torch.stack([train.images[train.labels == c].mean(0).flatten() for c in range(10)])
    test = arrays(splits.test)
    small = torch.nn.functional.interpolate(test.inputs.float() / 255, (8, 8), mode="area").flatten(1)
    right = (torch.cdist(small, means).argmin(1) == test.labels).float().mean()
    assert 0.3 < float(right) < 0.9


def test_stratified_split_covers_every_sample_once_even_with_single_sample_classes() -> None:
    for labels in (torch.arange(40), torch.arange(300) % 7, torch.zeros(23, dtype=torch.long)):
        parts = stratified_split(labels, (0.6, 0.15, 0.25), seed=3)
        assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
        for part, share in zip(parts, (0.6, 0.15, 0.25), strict=True):
            assert abs(len(part) - share * len(labels)) <= 2
    assert all(map(torch.equal, stratified_split(labels, (0.5, 0.5), 1), stratified_split(labels, (0.5, 0.5), 1)))


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dyncompress.model_zoo.train.TRAIN_DRAWS", 1)
    monkeypatch.setattr("dyncompress.model_zoo.data.digits.TRAIN_DRAWS", 1)


@pytest.mark.usefixtures("short_epochs")
def test_training_is_seeded() -> None:
    recipe = Recipe(epochs=1, learning_rate=3e-3, batch=64)
    first, second = (train("lstm-digits", recipe, seed=5) for _ in range(2))
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


@pytest.mark.usefixtures("short_epochs")
def test_the_command_writes_a_checkpoint_and_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], splits: Splits
) -> None:
    monkeypatch.setitem(RECIPES, "lstm-digits", Recipe(epochs=6, learning_rate=5e-3, batch=64))
    assert main(["lstm-digits", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / RECORD).read_text())["lstm-digits"]
    assert record["epochs"] == 6 and record["test_accuracy"] > 0.15
    monkeypatch.setattr("dyncompress.model_zoo.zoo.CHECKPOINTS", tmp_path)
    assert accuracy(load("lstm-digits"), arrays(splits.test)) == pytest.approx(record["test_accuracy"], abs=1e-4)
    assert capsys.readouterr().out == ""


def test_the_command_refuses_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["alexnet"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
