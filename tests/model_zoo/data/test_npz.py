"""Arrays in npz files: what is read, how it is divided, and one line for every mistake."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import PUBLIC, classes, pictures, refusal

from dyncompress.model_zoo import load_data
from dyncompress.model_zoo.data.splits import ArrayDataset


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., str]:
    def write(**arrays: Any) -> str:
        np.savez(tmp_path / "data.npz", **arrays)
        return f"npz:{tmp_path / 'data.npz'}"

    return write


def test_npz_keeps_the_splits_it_brings(npz: Callable[..., str]) -> None:
    x = pictures(60)
    source = npz(
        x_train=x[:40], y_train=classes(40), x_test=x[40:50], y_test=classes(10), x_val=x[50:], y_val=classes(10)
    )
    splits = load_data(source)
    assert [len(data) for _, data in splits.items()] == [40, 10, 10]
    assert splits.classes == 3 and splits.name == source
    for index, (data, row) in enumerate([(splits.train, 7), (splits.test, 7), (splits.calibration, 7)]):
        value, label = data[7]
        np.testing.assert_allclose(value.numpy()[0], x[[row, 40 + row, 50 + row][index]] / 255, rtol=1e-6)
        assert label == 7 % 3 and type(label) is int and value.dtype == torch.float32


def test_npz_without_splits_is_divided_without_overlap_and_seeded(npz: Callable[..., str]) -> None:
    source = npz(x=np.arange(200, dtype=np.float64).reshape(100, 2), y=classes(100, 5))
    splits = load_data(source, seed=4)
    rows = [[int(data[i][0][0]) // 2 for i in range(len(data))] for _, data in splits.items()]
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
    x = np.random.default_rng(0).normal(size=(30, 4, 3)).astype(np.float32) * 50
    splits = load_data(npz(x=x, y=classes(30).astype(np.float64)))
    assert any(np.array_equal(splits.train[0][0].numpy(), row) for row in x)
    tokens = load_data(npz(x=np.arange(90).reshape(30, 3), y=classes(30)[:, None]))
    assert tokens.train[0][0].dtype == torch.int64


FASHION = PUBLIC / "fashion_mnist" / "fashion_mnist.npz"
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


@pytest.mark.skipif(not FASHION.exists(), reason="the data set is not here")
def test_fashion_mnist() -> None:
    splits = load_data(f"npz:{FASHION}")
    assert [len(data) for _, data in splits.items()] == [51000, 9000, 10000]
    assert splits.classes == 10 and splits.test[0][0].shape == (1, 28, 28)
    assert isinstance(splits.train, ArrayDataset)
    assert splits.train.labels.bincount().min() >= 5098
