"""What a job has done so far, in a file: replaced at once, read back only by the same job."""

import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ...errors import RequestError


class Store:
    """The file that a job saves its state in; without a folder nothing is saved. `saved` is the state to go on from.

    Of several processes, which all do the same, the main one writes.

    Args:
        name: of the file in the folder.
        settings: what must be the same for the job to continue, by name: numbers, texts, lists and dicts of them.
        resume: go on from the file, if there is one.
        holds: the names in every state, by which states of older versions are told.

    Raises:
        RequestError: the folder holds a job but `resume` is not given, one with other settings, or a damaged file;
            resume without a folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        name: str,
        settings: Mapping[str, object],
        *,
        resume: bool,
        holds: Iterable[str],
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._name, self._settings = name, dict(settings)
        self.saved: dict[str, Any] | None = None
        if self.folder is None:
            if resume:
                raise RequestError("resume needs the run_dir of the run to continue")
            return
        begun = (self.folder / name).exists()
        PartialState().wait_for_everyone()  # before one of several processes writes the file
        if not begun:
            return
        if not resume:
            raise RequestError(f"{self.folder} holds a run already: continue it with resume, or use another run_dir")
        self.saved = self._checked(read_state(self.folder / name, holds))

    def _checked(self, state: dict[str, Any]) -> dict[str, Any]:
        before, now = state["settings"], self._settings
        for name in now | before:
            if before.get(name) != now.get(name):
                raise RequestError(
                    f"the run in {self.folder} has {name} = {before.get(name)}, not {now.get(name)}: "
                    "continue it with its own settings, or use another run_dir"
                )
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the file at once, so that an interruption leaves the old state or the new one."""
        if self.folder is None:
            return
        PartialState().wait_for_everyone()
        if not PartialState().is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{self._name}.part"
        torch.save({"settings": self._settings, **state}, unfinished)
        os.replace(unfinished, self.folder / self._name)


def read_state(path: Path, holds: Iterable[str]) -> dict[str, Any]:
    """The settings and the state in a file. Raises RequestError for a damaged one, and for one without these names."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RequestError(f"{path} cannot be read as a saved run: remove it to start anew") from error
    if not isinstance(state, dict) or not {"settings", *holds} <= state.keys():
        raise RequestError(f"{path} is a run of an older version, which cannot go on: remove it to start anew")
    return state
