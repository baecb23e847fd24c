"""Runs that stop and go on, and the folders they are in."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ARCH, DATA, words

from dyncompress.cli.runs import folders
from dyncompress.compress.recipes import take_step as steps
from dyncompress.compress.training.store import Store
from dyncompress.runtime.files import checkpoint


def test_an_interrupted_pruning_resumes(weights: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "prune NET DATA --params 0.6 --steps 2 --finetune 2 --batch-size 64"
    straight = cli(f"{command} --out straight --json").report
    save, saved = Store.save, []

    def stop(store: Store, state: dict[str, Any]) -> None:
        save(store, state)
        saved.append(state)
        if len(saved) == 3:  # the second cut's first epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", stop)
        assert cli(f"{command} --out halted").status == 130
    resumed = cli(f"{command} --out halted --resume --json").report
    assert resumed["pruned"]["accuracy"] == straight["pruned"]["accuracy"]
    one, two = (checkpoint.load(report["model"]).state_dict() for report in (straight, resumed))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_an_interrupted_recipe_goes_on_at_the_unfinished_step(
    weights: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"model: net.pt\narch: {ARCH}\ndata: {DATA}\nsteps: [{{prune: {{macs: 0.6}}}}, {{convert: {{epochs: 1}}}}]"
    Path("r.yaml").write_text(text)

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    changes = "--set convert.exits=1 --set convert.macs=0.9"
    with monkeypatch.context() as patch:
        patch.setattr(steps, "convert", interrupt)
        outcome = cli(f"run r.yaml {changes}")
    assert outcome.status == 130
    assert "Traceback" not in outcome.err
    *_, line = outcome.err.splitlines()
    assert line.endswith(f"continue with dyncompress run r.yaml {changes} --out runs/run-net-1 --resume")

    monkeypatch.setattr(steps, "prune", interrupt)  # done already: not to be called again
    assert "holds another run" in cli("run r.yaml --out runs/run-net-1 --resume").line
    outcome = cli(f"run r.yaml {changes} --resume --json")
    assert outcome.status == 0, outcome.err
    assert set(outcome.report) >= {"static", "pruned", "dynamic"}
    assert outcome.report["run_dir"] == "runs/run-net-1"


def test_an_interrupted_training_ends_as_if_it_had_not_been(
    weights: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "convert NET DATA --exits 1 --epochs 2 --macs 0.9 --json"
    whole = cli(f"{command} --out whole")
    save = Store.save

    def save_and_stop(store: Store, state: dict[str, Any]) -> None:
        save(store, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", save_and_stop)
        assert cli(f"{command} --out halves").status == 130
    resumed = cli(f"{command} --out halves --resume")
    models = [checkpoint.load(outcome.report["model"]) for outcome in (whole, resumed)]
    for ours, theirs in zip(*(model.state_dict().values() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert resumed.report["dynamic"]["exits"] == whole.report["dynamic"]["exits"]


def start(command: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "dyncompress", *words(command)],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores Ctrl-C
    )


def test_ctrl_c_and_resume_in_a_process_of_its_own(weights: Path) -> None:
    folder = Path.cwd()
    command = "convert NET DATA --exits 1 --epochs 4000 --macs 0.9 --out run --json"
    process = start(command, folder)
    state = Path("run/steps/1-convert/training.pt")
    patience = time.monotonic() + 60
    while not state.exists() and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert "--out run --json --resume" in err.splitlines()[-1]
    assert state.exists()


def test_a_wrong_request_leaves_no_folder(weights: Path, cli: Any) -> None:
    assert "exits=9" in cli("convert NET DATA --exits 9 --out fresh").line
    assert not Path("fresh").exists()


def test_taken_folders(weights: Path, cli: Any) -> None:
    command = "prune NET DATA --ratio 0.5"
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep me")
    assert "not empty" in cli(f"{command} --out mine").line
    assert "no run to resume" in cli(f"{command} --out mine --resume").line
    assert "is a file" in cli(f"{command} --out net.pt").line
    assert cli(f"{command} --out mine --overwrite").status == 0
    assert Path("mine/notes.txt").read_text() == "keep me"
    assert cli(f"{command} --out mine --overwrite --seed 1").status == 0
    assert "seed: 1" in Path("mine/recipe.yaml").read_text()
    assert "holds another run ('seed: 1' there, 'seed: 2' here)" in cli(f"{command} --out mine --resume --seed 2").line


def test_folder_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def choose(resume: bool) -> str:
        return folders.choose_folder("convert", "a b", None, resume=resume, overwrite=False).name

    assert choose(resume=True) == choose(resume=False) == "convert-a-b-1"
    (tmp_path / "runs" / "convert-a-b-9").mkdir(parents=True)
    (tmp_path / "runs" / "convert-a-b-x").mkdir()
    assert choose(resume=False) == "convert-a-b-10"
    assert choose(resume=True) == "convert-a-b-9"
