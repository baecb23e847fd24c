"""Runs of learned sparsity: the command line, exact resumption, several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data import make_stripes, stripes
from flat_options import flat
from nets import seeded, small_resnet
from trained import SPARSIFY, same, stopped

import dyncompress as dc
from dyncompress.cli.main import run

STEPS = 6  # per epoch of batches of 32
RESUMED: dict[str, Any] = SPARSIFY | {"shrink_every": 1, "ema": 0.9, "macs": 0.3, "epochs": 5}


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Stopped after its first surgery, and again after its last."""
    whole = flat(dc.sparsify)(seeded(), stripes(), **RESUMED)
    first, *_, last = (s["epoch"] for s in whole.meta["info"]["sparsify"]["surgeries"])
    assert first < last
    for step, resume in ((first * STEPS + 2, False), ((last - first) * STEPS + 2, True)):
        with pytest.raises(KeyboardInterrupt, match="continue with resume"):
            flat(dc.sparsify)(seeded(), stripes(), loss_fn=stopped(step), run_dir=tmp_path, resume=resume, **RESUMED)
        torch.manual_seed(99)
    again = flat(dc.sparsify)(seeded(), stripes(), run_dir=tmp_path, resume=True, **RESUMED)
    assert same(again, whole)
    assert again.meta["info"]["sparsify"] == whole.meta["info"]["sparsify"]
    with pytest.raises(dc.RequestError, match="has target"):
        flat(dc.sparsify)(seeded(), stripes(), run_dir=tmp_path, resume=True, **RESUMED | {"macs": 0.4})


def begun(code: str, **environment: str) -> subprocess.Popen[str]:
    """Runs code that begins with the names that these tests share, in a process of its own."""
    text = f"""import os, signal, sys, torch, dyncompress as dc
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from data import stripes
from flat_options import flat
from nets import seeded
from trained import SPARSIFY
{code}"""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE, text=True, env=own)


def test_two_processes_make_the_same_model(tmp_path: Path) -> None:
    code = f"""
torch.set_num_threads(1)
options = SPARSIFY | {{"epochs": 1, "batch_size": 16, "macs": 0.3, "grow_batch": True}}
small = flat(dc.sparsify)(seeded(), stripes(), run_dir={str(tmp_path / "run")!r}, **options)
assert small.meta["info"]["sparsify"]["surgeries"] and torch.distributed.get_world_size() == 2
saved = {{"sizes": small.meta["info"]["sparsify"]["batch_sizes"], **dict(small.named_parameters())}}
torch.save(saved, {str(tmp_path)!r} + "/" + os.environ["RANK"])
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    shared["ACCELERATE_USE_CPU"] = "1"  # as `accelerate launch --cpu` has it: else each process trains alone
    started = [begun(code, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]
    for process in started:
        with process:
            _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said[-2000:]
    one, two = (torch.load(tmp_path / rank) for rank in "01")
    (first, then), others = one.pop("sizes"), two.pop("sizes")
    assert first == 16 < then and others == [first, then]
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["training.pt"]
    assert torch.load(tmp_path / "run" / "training.pt")["settings"]["processes"] == 2


# --- the command line -------------------------------------------------------------------------------------------------

RUN = ["sparsify", "nets:small_resnet", "--kinds", "axes", "--kinds", "layers", "--macs", "0.3", "--epochs", "3"]
RUN += ["--finetune", "1", "--shrink-every", "1", "--ema", "0.9", "--lr", "0.01", "--batch-size", "16", "--grow-batch"]
SOURCE = ["--data", "data:make_stripes", "--device", "cpu", "--json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the command line."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("runs") / "small"
    assert run([*RUN, *SOURCE, "--out", str(path)]) == 0
    return path


def report_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_the_report(folder: Path) -> None:
    report = report_in(folder)
    static, small, done = report["static"], report["sparsified"], report["sparsify"]
    assert small["macs"] <= 0.3 * static["macs"] and small["parameters"] < static["parameters"]
    assert done["left"] == pytest.approx(small["macs"] / static["macs"]) and done["kinds"] == ["axes", "layers"]
    assert done["batch_sizes"][0] == 16 < done["batch_sizes"][-1]
    assert {"layers.csv", "kept.png", "recipe.yaml"} <= {path.name for path in folder.iterdir()}
    assert "groups" in (folder / "table.txt").read_text()


def test_its_recipe_makes_the_same_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", str(folder / "recipe.yaml"), "--out", str(tmp_path), "--set", "seed=0"]) == 0
    assert "groups" in capsys.readouterr().out
    assert same(dc.load(tmp_path / "model.safetensors"), dc.load(folder / "model.safetensors"))


def test_a_killed_run_resumes_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    arguments = [*RUN, *SOURCE, "--out", str(tmp_path)]
    done = report_in(folder)["sparsify"]
    first = next(epoch for epoch, size in enumerate(done["batch_sizes"]) if size > 16)  # epochs before it grows
    step = sum(240 // size for size in done["batch_sizes"][:first]) + 3
    code = f"""
from dyncompress.cli.main import run
from dyncompress.compress.sparsity.sparsifier import Sparsifier
def after_step(self, step, real=Sparsifier.after_step):
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, step)
Sparsifier.after_step = after_step
run({arguments!r})
"""
    with begun(code) as process:
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "steps" / "1-sparsify" / "training.pt").exists()
    assert run([*arguments, "--resume"]) == 0
    assert report_in(tmp_path)["sparsify"] == report_in(folder)["sparsify"]
    assert same(dc.load(tmp_path / "model.safetensors"), dc.load(folder / "model.safetensors"))


@pytest.mark.parametrize("early", [None, "nets:small_resnet"])
def test_its_shape_is_trained_anew(
    folder: Path, tmp_path: Path, early: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    small, data = dc.load(folder / "model.safetensors"), make_stripes().train
    words = ["retrain", str(folder / "model.safetensors"), *SOURCE, "--epochs", "2", "--out", str(tmp_path / "run")]
    assert run([*words, *(["--early", early] if early else [])]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["retrained"]["macs"] == report["static"]["macs"]
    whole = dc.capture(small_resnet(), data[0][0][None]) if early else None
    expected = dc.retrain(small, data, early=whole, training=dc.Training(epochs=2), run=dc.Run(device="cpu"))
    assert same(dc.load(report["model"]), expected) and not same(expected, small)


def test_earlier_weights_of_another_model_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["retrain", str(folder / "model.safetensors"), *SOURCE, "--out", str(tmp_path / "run"), "--early"]
    assert run([*words, "nets:linear"]) == 2
    said = capsys.readouterr().err
    assert "the earlier weights are of another model" in said.splitlines()[-1] and not (tmp_path / "run").exists()


def test_it_needs_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(RUN) == 2
    assert "--data" in capsys.readouterr().err
