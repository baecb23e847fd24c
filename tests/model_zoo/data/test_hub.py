"""Data sets of the hub, from a local copy: what is read, and one line for every mistake."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data import classes, refusal
from PIL import Image

from dyncompress.model_zoo import load_data


@pytest.fixture
def hf(tmp_path: Path) -> Callable[..., str]:
    datasets = pytest.importorskip("datasets")

    def write(columns: dict[str, Any], features: dict[str, Any] | None = None, splits: tuple[str, ...] = ()) -> str:
        typed = datasets.Features(features) if features else None
        table = datasets.Dataset.from_dict(columns, features=typed)
        saved = datasets.DatasetDict(dict.fromkeys(splits, table)) if splits else table
        saved.save_to_disk(tmp_path / "saved")
        return f"hf:{tmp_path / 'saved'}"

    return write


def test_hf_images(hf: Callable[..., str]) -> None:
    datasets = pytest.importorskip("datasets")
    images = [Image.new("L", (6, 4), value) for value in range(20)]
    columns = {"image": images, "label": classes(20, 2).tolist()}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])}
    source = hf(columns, features, ("train", "validation", "test"))
    splits = load_data(source)
    assert [len(data) for _, data in splits.items()] == [20, 20, 20]
    x, y = splits.test[7]
    assert x.shape == (1, 4, 6) and y == 1 and round(float(x.mean()) * 255) == 7
    assert load_data(f"{source}?size=8").train[0][0].shape == (1, 8, 8)


def test_hf_numbers(hf: Callable[..., str]) -> None:
    columns = {"idx": list(range(30)), "a": [0.5] * 30, "b": list(range(30)), "target": classes(30).tolist()}
    splits = load_data(hf(columns))
    assert splits.train[0][0].shape == (2,) and splits.classes == 3
    assert sum(len(data) for _, data in splits.items()) == 30


def test_hf_arrays(hf: Callable[..., str]) -> None:
    splits = load_data(hf({"pixels": [[[1.0, 2.0], [3.0, 4.0]]] * 30, "y": classes(30).tolist()}))
    assert splits.train[0][0].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [0.5] * 30}, "no label column among a"),
        ({"sentence": ["word"] * 30, "label": classes(30).tolist()}, "'sentence' is text"),
        ({"label": classes(30).tolist()}, "no single input among no columns"),
        ({"a": [[1.0], [1.0, 2.0]] * 15, "label": classes(30).tolist()}, "different shapes"),
        ({"a": [float("nan")] * 30, "label": classes(30).tolist()}, "NaN"),
        ({"a": [1.0] * 30, "label": (classes(30) - 1).tolist()}, "labels start at 0"),
    ],
)
def test_hf_mistakes(hf: Callable[..., str], columns: dict[str, Any], message: str) -> None:
    assert message in refusal(hf(columns))


def test_hf_split_names(hf: Callable[..., str]) -> None:
    assert "one must be called train" in refusal(hf({"a": [1.0], "label": [0]}, None, ("holdout",)))


def test_hf_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*_: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert "cannot be loaded: no route" in refusal("hf:someone/something")
    assert "no such folder" in refusal(f"hf:{tmp_path / 'none'}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal("hf:someone/something")
