"""The file that an interrupted job goes on from: what it refuses, and that it is replaced at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dyncompress.compress.training.store import Store, read_state
from dyncompress.errors import RequestError

SETTINGS: dict[str, Any] = {"lr": 0.1, "kinds": ["axes"]}


def store(folder: Path | None, resume: bool = False, **changes: Any) -> Store:
    return Store(folder, "state.pt", SETTINGS | changes, resume=resume, holds=("done",))


def test_goes_on_from_what_was_saved_last(tmp_path: Path) -> None:
    first = store(tmp_path / "new")
    assert first.saved is None and not (tmp_path / "new").exists()
    for done in (1, 2):
        first.save({"done": done, "weights": torch.full((3,), done)})
    saved = store(tmp_path / "new", resume=True).saved
    assert saved is not None and saved["done"] == 2 and saved["weights"].tolist() == [2, 2, 2]
    assert read_state(tmp_path / "new" / "state.pt", ("done",))["settings"] == SETTINGS


def test_without_a_folder_nothing_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store(None).save({"done": 1})
    assert not list(tmp_path.iterdir())
    with pytest.raises(RequestError, match="resume needs the run_dir"):
        store(None, resume=True)


def test_an_interrupted_save_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store(tmp_path)
    first.save({"done": 1})

    def half(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", half)
        first.save({"done": 2})
    saved = store(tmp_path, resume=True).saved
    assert saved is not None and saved["done"] == 1


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []

    class Other:
        is_main_process = False

        def wait_for_everyone(self) -> None:
            waited.append(1)

    monkeypatch.setattr("dyncompress.compress.training.store.PartialState", Other)
    store(tmp_path).save({"done": 1})
    assert len(waited) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "holds a run already: continue it with resume"),
        ({"resume": True, "lr": 0.2}, r"has lr = 0\.1, not 0\.2"),
        ({"resume": True, "kinds": ["axes", "layers"]}, r"has kinds = \['axes'\], not \['axes', 'layers'\]"),
        ({"resume": True, "seed": 1}, "has seed = None, not 1"),
    ],
)
def test_another_run_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    store(tmp_path).save({"done": 1})
    with pytest.raises(RequestError, match=message):
        store(tmp_path, **changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a saved run: remove it"),
        (b"no checkpoint", "cannot be read as a saved run: remove it"),
        ({"settings": SETTINGS}, "an older version, which cannot go on: remove it"),
        ({"done": 1}, "an older version, which cannot go on: remove it"),
        ([1], "an older version, which cannot go on: remove it"),
    ],
)
def test_files_that_hold_no_such_state(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(RequestError, match=message):
        store(tmp_path, resume=True)
