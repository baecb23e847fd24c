"""Data from a function of the user's own, and one line for every mistake."""

import sys
from pathlib import Path

import pytest
from data import refusal
from torch.utils.data import TensorDataset

from dyncompress.model_zoo import Splits, load_data

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
    assert [len(data) for _, data in splits.items()] == [17, 3, 20]
    assert splits.classes == 2 and splits.name == f"{module}:pair"
    rows = [int(data[i][0][0]) for data in (splits.train, splits.calibration) for i in range(len(data))]
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
