"""What each cut of an iterative pruning kept, on disk, so that an interrupted run makes the same cuts again."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import RequestError

_FILE = "cut.json"


@dataclass(frozen=True)
class Cut:
    """Kept indices by axis name, the share of the target that they leave, and what else there is to tell."""

    keep: dict[str, list[int]]
    left: float
    note: dict[str, float]


class CutStore:
    """A folder per step; without a folder nothing is kept.

    Raises:
        RequestError: the folder holds a run but `resume` is not given, or a run with another request.
    """

    def __init__(self, root: Path | None, request: dict[str, Any], resume: bool) -> None:
        if root is None and resume:
            raise RequestError("resume needs the run_dir of the run to continue")
        self._root, self._request = root, request
        first = self._file(1)
        if first is None or not first.exists():
            return
        if not resume:
            raise RequestError(f"{root} holds a run already: continue it with resume, or use another run_dir")
        before = self._load(first)["request"]
        for name, value in request.items():
            if before.get(name) != value:
                raise RequestError(
                    f"the run in {root} has {name} = {before.get(name)}, not {value}: "
                    "continue it with its own settings, or use another run_dir"
                )

    def folder(self, step: int) -> Path | None:
        """Where the training of a step, counted from 1, keeps its state."""
        return self._root / f"cut-{step}" if self._root is not None else None

    def read(self, step: int) -> Cut | None:
        """The cut of a step, if it was made."""
        file = self._file(step)
        if file is None or not file.exists():
            return None
        return Cut(**self._load(file)["cut"])

    def write(self, step: int, cut: Cut) -> None:
        """Keeps a cut; the file is there at once or not at all."""
        file = self._file(step)
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps({"request": self._request, "cut": asdict(cut)}), encoding="utf-8")
        os.replace(unfinished, file)

    def _file(self, step: int) -> Path | None:
        folder = self.folder(step)
        return folder / _FILE if folder is not None else None

    def _load(self, file: Path) -> dict[str, Any]:
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            Cut(**state["cut"]), state["request"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{file} cannot be read as a cut of a run: remove its folder to start anew") from error
        return state
