"""Runs that are killed, stopped, or meet a full disk: they go on, and never leave a half-written file."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_files import INDEX, contents, empty, shrink, some
from torch import fx

import dyncompress as dc
from dyncompress.runtime.files import shards
from dyncompress.runtime.sharded import shard_writer

STEP = 7  # of the events at which a run is killed; shards have other numbers of events, so that all kinds occur


def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bytes(
    gm: fx.GraphModule, source: Path, tmp_path: Path
) -> None:
    whole = contents(shrink(gm, source, tmp_path / "whole"))
    worker = subprocess.run(
        [sys.executable, __file__, str(source), str(tmp_path)], capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    killed, events = json.loads(worker.stdout)
    assert len(killed) >= 8 and killed[-1] < events <= killed[-1] + STEP  # all that were to be killed were
    finished = set()
    for at in killed:
        left = tmp_path / f"killed-{at}"
        found = contents(left)
        assert INDEX not in found or set(whole) <= set(found)
        shown = {name: data for name, data in found.items() if not name.startswith(".")}
        shown.pop("unfinished.json", None)
        assert all(whole[name] == data for name, data in shown.items())  # no name without all of its bytes
        done = json.loads((left / "unfinished.json").read_text())["done"] if "unfinished.json" in found else {}
        finished.add(len(done))
        before = {name: (left / name).stat().st_ino for name in done}
        if INDEX not in found:  # not yet a model
            with pytest.raises(dc.RequestError, match=r"is unfinished|is a directory|there is no file"):
                dc.load(left)
        if INDEX not in found or "unfinished.json" in found:
            assert contents(shrink(gm, source, left)) == whole
        else:
            assert found == whole
        assert {name: (left / name).stat().st_ino for name in done} == before  # what was done is not done again
    assert len(finished) > 3


def die_at(event: int, source: Path, out: Path, gm: fx.GraphModule) -> tuple[bool, int]:
    """Shrinks in a process that kills itself at the given read, sync or rename; whether it died, and events seen."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        seen = 0

        def count(function: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any) -> Any:
                nonlocal seen
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
                return function(*args)

            return counted

        shards._fill = count(shards._fill)
        shard_writer.os = namedtuple("Os", "fsync replace open close O_RDONLY")(  # type: ignore[assignment]
            count(os.fsync), count(os.replace), os.open, os.close, os.O_RDONLY
        )
        shrink(gm, source, out)
        os.write(writing, struct.pack("i", seen))
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    died = os.WIFSIGNALED(status)
    events = 0 if died else struct.unpack("i", os.read(reading, 4))[0]
    os.close(reading)
    return died, events


def kill_everywhere() -> None:
    """Run as a program: one run killed at each STEP-th event; prints which, and how many events a whole run has."""
    torch.set_num_threads(1)
    source, folder, gm = Path(sys.argv[1]), Path(sys.argv[2]), empty()
    killed, at = [], 0
    while (outcome := die_at(at, source, folder / f"killed-{at}", gm))[0]:
        killed.append(at)
        at += STEP
    shutil.rmtree(folder / f"killed-{at}")
    print(json.dumps([killed, outcome[1]]))


def test_another_request_does_not_go_on(gm: fx.GraphModule, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(gm, source, out)
    left = contents(out)
    keep = {next(iter(some(gm))): [0]}
    for changed in (
        lambda **o: dc.shrink_checkpoint(gm, keep, source, out, progress=False, resume=True, **o),
        lambda **o: shrink(gm, source, out, max_shard_bytes=5000, **o),
    ):
        with pytest.raises(dc.RequestError, match="unfinished run of another"):
            changed()
    with pytest.raises(dc.RequestError, match="unfinished run: resume"):
        shrink(gm, source, out, resume=False)
    assert contents(out) == left
    fresh = contents(shrink(gm, source, tmp_path / "fresh", max_shard_bytes=5000))
    assert contents(shrink(gm, source, out, max_shard_bytes=5000, overwrite=True)) == fresh


def interrupt(gm: fx.GraphModule, source: Path, out: Path) -> None:
    """Stops a run after its second shard."""
    with pytest.MonkeyPatch.context() as patch:
        real, count = os.replace, 0

        def replace(*args: Any) -> None:
            nonlocal count
            count += str(args[1]).endswith(".safetensors")
            if count == 3:
                raise KeyboardInterrupt
            real(*args)

        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            shrink(gm, source, out)
    assert len(list(out.glob("*.safetensors"))) == 2 and not list(out.glob(".*"))


def test_a_finished_model_is_not_replaced_unless_asked(gm: fx.GraphModule, source: Path, tmp_path: Path) -> None:
    out = shrink(gm, source, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(dc.RequestError, match="holds a model already"):
        shrink(gm, source, out)
    assert contents(out) == before
    after = contents(shrink(gm, source, out, max_shard_bytes=10**9, overwrite=True))
    assert {"notes.txt", "model-00001-of-00001.safetensors", INDEX, "graph.dyn"} == set(after)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_half_written(
    step: str, gm: fx.GraphModule, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = contents(shrink(gm, source, tmp_path / "whole")), tmp_path / "out"
    real, calls = getattr(os, step), 0

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, step, full)
    with pytest.raises(dc.DynCompressError, match=r"cannot write .*No space left on device; free some space") as caught:
        shrink(gm, source, out)
    assert "\n" not in str(caught.value)
    left = contents(out)
    assert left.pop("unfinished.json") and all(whole[name] == data for name, data in left.items())
    assert contents(shrink(gm, source, out)) == whole


def test_too_small_a_disk_is_refused_before_anything_is_written(
    gm: fx.GraphModule, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100))
    with pytest.raises(dc.DynCompressError, match=r"needs 0\.00 GB, but its disk has 0\.00 GB"):
        shrink(gm, source, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


if __name__ == "__main__":
    kill_everywhere()
