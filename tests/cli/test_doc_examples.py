"""What README.md, docs/ and examples/ show runs: Python on a small network and few images, recipes made small."""

import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dyncompress.cli.main import run
from dyncompress.compress.exits.recipes import RECIPES
from dyncompress.compress.importance.scores import IMPORTANCES
from dyncompress.model_zoo.data.splits import Splits
from dyncompress.model_zoo.load_data import load_data
from dyncompress.model_zoo.networks.resnet import ResNetCifar
from dyncompress.passes.dims.rule_registry import OP_RULES

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
PAGES = [p for p in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]) if BLOCK.search(p.read_text("utf-8"))]
LENET = "zoo:lenet(size=16)"
RESNET = "zoo:resnet20-cifar(depth=8, channels=1, width=4)"
MSDNET = "zoo:msdnet-cifar(exits=3, base=1, step=1, channels=1)"
SMALL = {  # what makes a recipe one of seconds, beside a small file of data
    "branchynet-alexnet": (f"model='{LENET}'", "convert.epochs=1"),
    "branchynet-lenet": (
        f"model='{LENET}'",
        "convert.epochs=1",
    ),
    "gate": (f"model='{RESNET}'", "gate.epochs=2", "convert.epochs=1"),
    "msdnet": (f"model='{MSDNET}'", "convert.epochs=1"),
    "recipe": (f"model='{RESNET}'", "prune.finetune=1", "convert.epochs=1"),
    "vgg-four-exits": (f"model='{RESNET}'", "convert.epochs=1"),
}
RECIPE = """\
model: zoo:lenet(size=16)
data: npz:images.npz
steps:
  - convert: {exits: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images.npz, 16x16 images in ten classes, and recipe.yaml."""
    folder, rng = tmp_path_factory.mktemp("docs"), np.random.default_rng(0)
    labels = np.arange(160) % 10
    patterns, noise = rng.random((10, 1, 16, 16), dtype=np.float32), rng.random((160, 1, 16, 16), dtype=np.float32)
    np.savez(folder / "images", x=patterns[labels] + noise / 2, y=labels)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture
def names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the blocks of a page find: a small residual network, images and splits of data."""
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    splits: Splits = load_data("npz:images.npz")
    images = torch.stack([splits.test[k][0] for k in range(8)])
    model = ResNetCifar(depth=8, channels=1, width=8).eval()
    return {"__name__": "__docs__", "model": model, "images": images, "data": splits}


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What the examples register is gone afterwards."""
    found: tuple[MutableMapping[Any, Any], ...] = (OP_RULES, IMPORTANCES, RECIPES)
    before = [dict(registry) for registry in found]
    yield
    for registry, old in zip(found, before, strict=True):
        registry.clear()
        registry.update(old)


@pytest.mark.filterwarnings("ignore:convert without data")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, names: dict[str, Any]) -> None:
    """One after the other, in one namespace."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        lines_before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_before + block[1], page, "exec"), names)


@pytest.mark.parametrize("name", SMALL)
def test_example_recipes_run(name: str, folder: Path, tmp_path: Path) -> None:
    changes = [f"data='npz:{folder}/images.npz'", *SMALL[name]]
    words = ["run", str(ROOT / f"examples/{name}.yaml"), "--out", str(tmp_path / "run")]
    assert run([*words, *(word for change in changes for word in ("--set", change))]) == 0
    assert (tmp_path / "run/report.json").exists()


def test_every_example_is_run() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.yaml")} == set(SMALL)
