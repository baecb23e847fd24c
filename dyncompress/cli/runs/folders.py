"""Run folders: a fresh one for every run, nothing overwritten unless asked, an interrupted run found again."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ...errors import RequestError

RECIPE = "recipe.yaml"
REPORT = "report.json"
TABLE, TABLE_WIDTH = "table.txt", 120
STEPS = "steps"  # what finished steps made and what the running one needs to resume
_RUNS = Path("runs")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run that can be resumed in `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder


def choose_folder(command: str, model_name: str, out: Path | None, *, resume: bool, overwrite: bool) -> Path:
    """The folder of this run: `out`, or runs/COMMAND-MODEL-N with the next N (the last one to resume).

    Raises RequestError when `out` is taken.
    """
    if out is None:
        return _numbered(f"{command}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', model_name)}", resume)
    check_free(out, resume=resume, overwrite=overwrite)
    return out


def check_free(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises RequestError for a folder that cannot take a run."""
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (resume or overwrite):
        raise RequestError(f"{folder} is not empty: give another folder, resume there (--resume), or --overwrite it")


def _numbered(stem: str, resume: bool) -> Path:
    numbers = [int(n) for path in _RUNS.glob(f"{stem}-*") if (n := path.name[len(stem) + 1 :]).isdecimal()]
    last = max(numbers, default=0)
    return _RUNS / f"{stem}-{last if resume and last else last + 1}"


def begin(folder: Path, recipe_text: str, *, resume: bool) -> None:
    """Makes the folder and writes the recipe into it; to resume, checks that it is the one already there.

    Raises RequestError when the folder holds another run.
    """
    recipe_file = folder / RECIPE
    if resume and recipe_file.exists():
        _check_same(folder, recipe_file.read_text(encoding="utf-8"), recipe_text)
        return
    if resume and folder.is_dir() and any(folder.iterdir()):
        raise RequestError(f"{folder} holds no run to resume ({RECIPE} is missing): give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    if recipe_file.exists():  # an old run, to be overwritten: what it had finished is not this run's
        shutil.rmtree(folder / STEPS, ignore_errors=True)
        (folder / REPORT).unlink(missing_ok=True)
    recipe_file.write_text(recipe_text, encoding="utf-8")


def abandon(folder: Path) -> None:
    """Takes back what `begin` made, unless a step has left something to resume from."""
    steps = folder / STEPS
    if any(path.is_file() for path in steps.rglob("*")):
        return
    shutil.rmtree(steps, ignore_errors=True)
    (folder / RECIPE).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def finish(folder: Path, report: Mapping[str, Any], show: Callable[[Console], None]) -> None:
    """Leaves table.txt, which `show` prints, and report.json in the folder, and nothing that only resuming needed."""
    with (folder / TABLE).open("w", encoding="utf-8") as file:
        show(Console(file=file, width=TABLE_WIDTH))
    unfinished = folder / f"{REPORT}.part"  # a run with a report is done, so that it is there whole or not at all
    unfinished.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / REPORT)
    shutil.rmtree(folder / STEPS, ignore_errors=True)


def _check_same(folder: Path, old: str, new: str) -> None:
    if old == new:
        return
    lines = zip([*old.splitlines(), ""], [*new.splitlines(), ""], strict=False)
    was, now = next((a.strip(), b.strip()) for a, b in lines if a != b)
    raise RequestError(
        f"{folder} holds another run ('{was}' there, '{now}' here): give the same options, another --out or --overwrite"
    )
