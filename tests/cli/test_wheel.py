"""The wheel holds the whole package, and runs in an environment of its own without the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that nothing is left in the checkout; nothing is downloaded."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "dyncompress", source / "dyncompress", ignore=shutil.ignore_patterns("__pycache__"))
    pip(sys.executable, "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(out))
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel in it; dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    made = folder / "bin/python"
    pip(sys.executable, "--python", str(made), "install", "--no-deps", str(wheel))
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")  # after the wheel's own
    return made


def pip(interpreter: str, *words: str) -> None:
    subprocess.run([interpreter, "-m", "pip", "--quiet", "--no-input", *words], check=True)


def printed(python: Path, cwd: Path, *words: str) -> str:
    """Standard output of the environment's Python, in an empty folder and without the checkout on its path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([python, *words], cwd=cwd, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def command(python: Path, cwd: Path, *words: str) -> Any:
    return json.loads(printed(python, cwd, "-m", "dyncompress", *words, "--json"))


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("dyncompress/")}
    package = ROOT / "dyncompress"
    kinds = ("*.py", "py.typed", "model_zoo/checkpoints/*")
    assert held == {str(path.relative_to(ROOT)) for kind in kinds for path in package.rglob(kind)}


def test_the_wheel_runs(python: Path, tmp_path: Path) -> None:
    where = printed(python, tmp_path, "-c", "import dyncompress; print(dyncompress.__file__)")
    assert Path(where.strip()).is_relative_to(python.parents[1])
    assert command(python, tmp_path, "inspect", "zoo:vgg-digits")["parameters"] > 0
    words = ("zoo:lenet(size=32)", "--data", "digits", "--exits", "1", "--epochs", "1")
    report = command(python, tmp_path, "convert", *words)
    assert len(report["dynamic"]["exits"]) == 2 and (tmp_path / report["model"]).exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    report = command(python, tmp_path, "demo")
    assert report["dynamic"]["accuracy"] > report["static"]["accuracy"] - 0.01
    assert report["dynamic"]["mean_macs"] < 0.6 * report["static"]["macs"]
    assert (tmp_path / report["onnx"]).exists()
