"""Every data source reads what it promises, and answers every mistake with one line that names it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from dyncompress.errors import RequestError
from dyncompress.model_zoo import Splits, load_data
from dyncompress.model_zoo.data.splits import ArrayDataset

FASHION = Path(__file__).parents[2] / "../shared/data/fashion_mnist/fashion_mnist.npz"

RNG = np.random.default_rng(0)


def pictures(count: int, *shape: int) -> np.ndarray[Any, Any]:
    return RNG.integers(0, 256, (count, *(shape or (6, 5))), dtype=np.uint8)


def classes(count: int, number: int = 3) -> np.ndarray[Any, Any]:
    return np.arange(count) % number


def refusal(source: str) -> str:
    """The message of the one-line RequestError that this source must give."""
    with pytest.raises(RequestError) as caught:
        load_data(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def count(data: Any) -> int:
    return len(data)


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., str]:
    def write(**arrays: Any) -> str:
        np.savez(tmp_path / "data.npz", **arrays)
        return f"npz:{tmp_path / 'data.npz'}"

    return write


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["mnist", "", "zoo_digits:big", "data.npz", "a b:c", "/some/path:x", ":"])
def test_an_unknown_source_lists_the_known_ones(source: str) -> None:
    assert "npz:FILE" in refusal(source)


@pytest.mark.parametrize("source", ["npz", "npz:", "imagefolder:", "text:", "hf:"])
def test_a_source_without_a_path_is_refused(source: str) -> None:
    assert "names no file or folder" in refusal(source)


# --- npz ------------------------------------------------------------------------------------------------------------


def test_npz_keeps_the_splits_it_brings(npz: Callable[..., str]) -> None:
    x = pictures(60)
    source = npz(
        x_train=x[:40], y_train=classes(40), x_test=x[40:50], y_test=classes(10), x_val=x[50:], y_val=classes(10)
    )
    splits = load_data(source)
    assert [count(data) for _, data in splits.items()] == [40, 10, 10]
    assert splits.classes == 3 and splits.name == source
    for index, (data, row) in enumerate([(splits.train, 7), (splits.test, 7), (splits.calibration, 7)]):
        value, label = data[7]
        np.testing.assert_allclose(value.numpy()[0], x[[row, 40 + row, 50 + row][index]] / 255, rtol=1e-6)
        assert label == 7 % 3 and type(label) is int and value.dtype == torch.float32


def test_npz_without_splits_is_divided_without_overlap_and_seeded(npz: Callable[..., str]) -> None:
    source = npz(x=np.arange(200, dtype=np.float64).reshape(100, 2), y=classes(100, 5))
    splits = load_data(source, seed=4)
    rows = [[int(data[i][0][0]) // 2 for i in range(count(data))] for _, data in splits.items()]
    assert sorted(row for part in rows for row in part) == list(range(100))
    assert [len(part) for part in rows] == [67, 13, 20]
    again, other = load_data(source, seed=4), load_data(source, seed=5)
    assert all(torch.equal(splits.test[i][0], again.test[i][0]) for i in range(20))
    assert any(not torch.equal(splits.test[i][0], other.test[i][0]) for i in range(20))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((6, 5), (1, 6, 5)), ((6, 5, 3), (3, 6, 5)), ((6, 5, 1), (1, 6, 5)), ((3, 6, 5), (3, 6, 5)), ((7,), (7,))],
)
def test_npz_images_become_channels_first(
    npz: Callable[..., str], shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    x = pictures(30, *shape)
    value, _ = load_data(
        npz(x_train=x, y_train=classes(30), x_test=x, y_test=classes(30), x_val=x, y_val=classes(30))
    ).test[4]
    assert value.shape == expected and value.dtype == torch.float32
    moved = x[4].transpose(2, 0, 1) if len(shape) == 3 and shape[2] in (1, 3) else x[4].reshape(expected)
    np.testing.assert_allclose(value.numpy(), moved / 255, rtol=1e-6)


def test_npz_floats_and_token_ids_are_left_as_they_are(npz: Callable[..., str]) -> None:
    x = RNG.normal(size=(30, 4, 3)).astype(np.float32) * 50
    splits = load_data(npz(x=x, y=classes(30).astype(np.float64)))
    assert any(np.array_equal(splits.train[0][0].numpy(), row) for row in x)
    tokens = load_data(npz(x=np.arange(90).reshape(30, 3), y=classes(30)[:, None]))
    assert tokens.train[0][0].dtype == torch.int64


GOOD = {"x": pictures(30), "y": classes(30)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": GOOD["x"]}, "none of the expected arrays; name the arrays x_train and y_train"),
        ({"x": GOOD["x"]}, "has x but no y"),
        ({"y_train": GOOD["y"]}, "has y_train but no x_train"),
        ({**GOOD, "x_test": GOOD["x"]}, "has x_test but no y_test"),
        ({"x_test": GOOD["x"], "y_test": GOOD["y"]}, "found only x_test, y_test"),
        ({"x": GOOD["x"], "y": classes(29)}, "x has 30 samples and y has 29"),
        ({"x": pictures(0), "y": classes(0)}, "empty"),
        ({"x": pictures(2), "y": classes(2)}, "too few samples"),
        ({"x": np.full((30, 2), np.nan), "y": GOOD["y"]}, "NaN or infinity, first in sample 0"),
        ({"x": np.arange(30.0), "y": GOOD["y"]}, "shape"),
        ({"x": np.array([["a"]] * 30), "y": GOOD["y"]}, "inputs must be numbers"),
        ({"x": pictures(30, 6, 5, 2), "y": GOOD["y"]}, "1, 3 or 4 channels"),
        ({"x": GOOD["x"], "y": classes(30) - 1}, "labels start at 0"),
        ({"x": GOOD["x"], "y": classes(30) + 0.5}, "fractions"),
        ({"x": GOOD["x"], "y": np.full(30, np.nan)}, "NaN"),
        ({"x": GOOD["x"], "y": np.array(["cat"] * 30)}, "whole numbers"),
        ({"x": GOOD["x"], "y": np.eye(30)}, "one class index per sample"),
        ({"x": GOOD["x"], "y": classes(30) * 1000}, "label 2000 is out of range"),
        ({"x": GOOD["x"], "y": classes(30, 1)}, "two classes"),
        (
            {**GOOD, "x_test": GOOD["x"], "y_test": classes(30, 4)},
            "test label 3 is out of range: training labels are 0..2",
        ),
        ({**GOOD, "x_test": pictures(30, 7, 7), "y_test": GOOD["y"]}, "store them alike"),
        ({"x": np.array([None, 1]), "y": classes(2)}, "not a readable npz"),
    ],
)
def test_npz_mistakes(npz: Callable[..., str], arrays: dict[str, Any], message: str) -> None:
    assert message in refusal(npz(**arrays))


def test_npz_names_the_first_bad_sample(npz: Callable[..., str]) -> None:
    x = np.zeros((30, 4, 2))
    x[17, 3, 1] = np.inf
    assert "first in sample 17" in refusal(npz(x=x, y=classes(30)))


def test_npz_files_that_cannot_be_read(tmp_path: Path, npz: Callable[..., str]) -> None:
    assert "no such file" in refusal(f"npz:{tmp_path / 'none.npz'}")
    assert "no such file" in refusal(f"npz:{tmp_path}")
    source = npz(**GOOD)
    whole = (tmp_path / "data.npz").read_bytes()
    broken = bytearray(whole)
    broken[len(whole) // 4] ^= 255  # inside the pixels: only the checksum notices
    for content in (whole[: len(whole) // 2], whole[:-30], b"", b"not an archive", bytes(broken)):
        (tmp_path / "data.npz").write_bytes(content)
        assert "not a readable npz archive" in refusal(source)
    np.save(tmp_path / "array.npy", GOOD["x"])
    assert "not a readable npz archive" in refusal(f"npz:{tmp_path / 'array.npy'}")


@pytest.mark.skipif(not FASHION.exists(), reason="the shared data folder is not here")
def test_fashion_mnist() -> None:
    splits = load_data(f"npz:{FASHION}")
    assert [count(data) for _, data in splits.items()] == [51000, 9000, 10000]
    assert splits.classes == 10 and splits.test[0][0].shape == (1, 28, 28)
    assert isinstance(splits.train, ArrayDataset)
    assert splits.train.labels.bincount().min() >= 5098


# --- imagefolder ----------------------------------------------------------------------------------------------------


def save_images(root: Path, per_class: int, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> None:
    for label, name in enumerate(["ant", "bee"]):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            value = label * 100 + index
            Image.new(mode, size, value if mode == "L" else (value, 0, 9)).save(root / name / f"{index:03}.png")


def test_imagefolder_of_classes_is_divided(tmp_path: Path) -> None:
    save_images(tmp_path, 20)
    splits = load_data(f"imagefolder:{tmp_path}")
    values = []
    for _, data in splits.items():
        for x, y in (data[i] for i in range(count(data))):
            assert x.shape == (3, 4, 6)
            value = round(float(x[0, 0, 0]) * 255)
            assert (value >= 100) == bool(y)
            values.append(value)
    assert sorted(values) == [*range(20), *range(100, 120)]
    assert splits.classes == 2


def test_imagefolder_with_splits_and_sizes(tmp_path: Path) -> None:
    for part, number in (("train", 10), ("val", 3), ("test", 4)):
        save_images(tmp_path / part, number, "L")
    save_images(tmp_path / "test", 1, "L", size=(30, 30))
    splits = load_data(f"imagefolder:{tmp_path}?size=8x16")
    assert [count(data) for _, data in splits.items()] == [20, 6, 8]
    assert {tuple(splits.test[i][0].shape) for i in range(8)} == {(1, 8, 16)}
    assert load_data(f"imagefolder:{tmp_path}").test[0][0].shape == (1, 4, 6)


def test_imagefolder_turns_everything_to_colour_when_one_image_is(tmp_path: Path) -> None:
    save_images(tmp_path, 10, "L")
    Image.new("RGB", (6, 4)).save(tmp_path / "bee" / "colour.jpg")
    assert load_data(f"imagefolder:{tmp_path}").train[0][0].shape == (3, 4, 6)


def test_imagefolder_mistakes(tmp_path: Path) -> None:
    assert "no such folder" in refusal(f"imagefolder:{tmp_path / 'none'}")
    assert "no sub-folders" in refusal(f"imagefolder:{tmp_path}")
    save_images(tmp_path, 10)
    for option in ("size=0", "size=axb", "size=1x2x3", "size=-4"):
        assert "no image size" in refusal(f"imagefolder:{tmp_path}?{option}")
    for option in ("colour=red", "size=", "size"):
        assert "no option" in refusal(f"imagefolder:{tmp_path}?{option}")
    (tmp_path / "cat").mkdir()
    assert "holds no images" in refusal(f"imagefolder:{tmp_path}")
    (tmp_path / "cat" / "x.png").write_text("meow")
    assert "x.png is not a readable image" in refusal(f"imagefolder:{tmp_path}")
    Image.new("I;16", (6, 4)).save(tmp_path / "cat" / "x.png")
    assert "8 bits" in refusal(f"imagefolder:{tmp_path}")


def test_imagefolder_classes_must_be_known_in_training(tmp_path: Path) -> None:
    save_images(tmp_path / "train", 10)
    save_images(tmp_path / "test", 2)
    (tmp_path / "test" / "wasp").mkdir()
    assert "no training class of that name" in refusal(f"imagefolder:{tmp_path}")


def test_an_image_cut_short_is_named_when_it_is_read(tmp_path: Path) -> None:
    save_images(tmp_path, 10, size=(60, 40))
    noise = Image.fromarray(pictures(40, 60, 3))
    for path in tmp_path.rglob("*.png"):
        noise.save(path)
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(RequestError, match=r"\.png is not a readable image"):
        load_data(f"imagefolder:{tmp_path}").train[0]


# --- hf -------------------------------------------------------------------------------------------------------------


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
    assert [count(data) for _, data in splits.items()] == [20, 20, 20]
    x, y = splits.test[7]
    assert x.shape == (1, 4, 6) and y == 1 and round(float(x.mean()) * 255) == 7
    assert load_data(f"{source}?size=8").train[0][0].shape == (1, 8, 8)


def test_hf_numbers(hf: Callable[..., str]) -> None:
    columns = {"idx": list(range(30)), "a": [0.5] * 30, "b": list(range(30)), "target": classes(30).tolist()}
    splits = load_data(hf(columns))
    assert splits.train[0][0].shape == (2,) and splits.classes == 3
    assert sum(count(data) for _, data in splits.items()) == 30


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


# --- package.module:factory -----------------------------------------------------------------------------------------

MODULE = """
import torch
from torch.utils.data import TensorDataset
from dyncompress.model_zoo import Splits
x, y = torch.arange(40.0).view(20, 2), torch.arange(20) % 2
data = TensorDataset(x, y)
def pair(): return data, data
def full(): return Splits(data, data, data, 2, "mine")
def nothing(): return None
def empty(): return data, TensorDataset(x[:0], y[:0])
def nan(): return TensorDataset(x / 0, y), data
def negative(): return data, TensorDataset(x, y - 1)
def fraction(): return TensorDataset(x, y + 0.5), data
def single(): return [x, x]
def numbers(): return 1, 2
def broken(): raise KeyError("boom")
def bad_splits(): return Splits(data, [], data, 2, "mine")
def unseen(): return data, TensorDataset(x, y + 1)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "zoo_user_data.py").write_text(MODULE)
    (tmp_path / "zoo_user_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "zoo_user_data", raising=False)
    return "zoo_user_data"


def test_factory_of_a_pair(module: str) -> None:
    splits = load_data(f"{module}:pair")
    assert [count(data) for _, data in splits.items()] == [17, 3, 20]
    assert splits.classes == 2 and splits.name == f"{module}:pair"
    rows = [int(data[i][0][0]) for data in (splits.train, splits.calibration) for i in range(count(data))]
    assert sorted(rows) == list(range(0, 40, 2))


def test_factory_of_splits(module: str) -> None:
    splits = load_data(f"{module}:full")
    assert isinstance(splits, Splits) and isinstance(splits.train, TensorDataset)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("none", "check the function's name"),
        ("x", "is a Tensor, not a function"),
        ("nothing", "returned a NoneType"),
        ("empty", "test is empty"),
        ("nan", "NaN or infinity"),
        ("negative", "labels start at 0"),
        ("fraction", "no whole number"),
        ("single", "not (input tensor, int label)"),
        ("numbers", "give a torch Dataset"),
        ("broken", "KeyError: 'boom'"),
        ("bad_splits", "calibration is empty"),
        ("unseen", "test label 2 is out of range"),
    ],
)
def test_factory_mistakes(module: str, function: str, message: str) -> None:
    assert message in refusal(f"{module}:{function}")


def test_factory_modules_that_cannot_be_imported(module: str) -> None:
    assert "No module named 'zoo_user_absent'" in refusal("zoo_user_absent:pair")
    assert "importing zoo_user_broken failed: ZeroDivisionError" in refusal("zoo_user_broken:pair")
