"""The state of a training run on disk: written at once at the end of an epoch, read back only by the same run."""

import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import RequestError

CHECKPOINT = "training.pt"


@dataclass(frozen=True)
class Settings:
    """What must be the same for a run to continue."""

    epochs: int
    lr: float
    batch_size: int
    seed: int
    samples: int
    processes: int
    method: Mapping[str, Any] = field(default_factory=dict)  # what else, by name


class RunStore:
    """The file a run saves its state in; without a folder nothing is saved."""

    def __init__(self, folder: Path | None, settings: Settings, resume: bool) -> None:
        self.folder, self.settings = folder, settings
        self.saved: dict[str, Any] | None = None
        if folder is None:
            if resume:
                raise RequestError("resume needs the run_dir of the run to continue")
            return
        if (folder / CHECKPOINT).exists():
            if not resume:
                raise RequestError(f"{folder} holds a run already: continue it with resume, or use another run_dir")
            self.saved = self._load(folder / CHECKPOINT)

    def _load(self, path: Path) -> dict[str, Any]:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise RequestError(f"{path} cannot be read as a saved run: remove it to start anew") from error
        if "batch_sizes" not in state:
            raise RequestError(f"{path} is a run of an older version, which cannot go on: remove it to start anew")
        before, now = (_flat(settings) for settings in (state["settings"], asdict(self.settings)))
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
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{CHECKPOINT}.part"
        torch.save({"settings": asdict(self.settings), **state}, unfinished)
        os.replace(unfinished, self.folder / CHECKPOINT)

    def interrupted(self, done: int) -> str:
        """What to tell a user who stopped the run."""
        where = f"interrupted after {done} of {self.settings.epochs} epochs"
        if self.folder is None:
            return f"{where}; nothing was saved (give a run_dir to be able to resume)"
        return f"{where}; continue with resume and run_dir {self.folder}"


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, **settings["method"], "method": None}
