"""Impressions on disk: written at once after every batch, read back only by the same synthesis."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from ...errors import RequestError

FILE = "impressions.pt"

Batch = tuple[Tensor, Tensor]  # inputs (B, ...), classes (B,)


class ImpressionStore:
    """The file a synthesis saves its batches in; without a folder nothing is saved.

    settings: what must be the same for a synthesis to continue.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: Mapping[str, Any], resume: bool) -> None:
        self.path = None if folder is None else Path(folder) / FILE
        self.settings = dict(settings)
        self.saved: list[Batch] = []
        begun = self.path is not None and self.path.exists()
        PartialState().wait_for_everyone()  # before one of several processes writes the file
        if self.path is None or not begun:
            return
        if not resume:
            raise RequestError(f"{folder} holds impressions already: continue with resume, or use another run_dir")
        state = read_impressions(self.path)
        for name, value in self.settings.items():
            if state["settings"][name] != value:
                raise RequestError(
                    f"the impressions in {folder} have {name} = {state['settings'][name]}, not {value}: "
                    "continue with their own settings, or use another run_dir"
                )
        self.saved = list(state["batches"])

    def save(self, batches: list[Batch]) -> None:
        """Replaces the file at once, so that an interruption leaves the old batches or the new ones."""
        if self.path is None or not PartialState().is_main_process:  # the others have made the same
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        torch.save({"settings": self.settings, "batches": batches}, unfinished)
        os.replace(unfinished, self.path)


def read_impressions(path: Path) -> dict[str, Any]:
    """The settings and batches of a file. Raises RequestError for a damaged one."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RequestError(f"{path} cannot be read as impressions: remove it to make them anew") from error
