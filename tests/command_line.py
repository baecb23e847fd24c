"""The command line as tests call it: in this process, by its words, with what it said."""

import json
import shlex
from typing import Any

import pytest

from dyncompress.cli.main import run

ARCH, DATA = "nets:ConvNet", "data:make_stripes"


def words(command: str) -> list[str]:
    """Of a command in which NET stands for trained weights of a `ConvNet`, and DATA for what it was trained on."""
    return shlex.split(command.replace("NET", f"net.pt --arch {ARCH}").replace("DATA", f"--data {DATA}"))


class Outcome:
    """How a command ended and what it said."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def line(self) -> str:
        """The only line on standard error, but for what was told of the progress."""
        *told, line = self.err.splitlines()
        assert not any("Traceback" in text or "Error" in text for text in told)
        assert line.startswith("dyncompress: ")
        assert self.out == ""
        return line


def told(capfd: pytest.CaptureFixture[str], *words: str, status: int = 0) -> tuple[str, str]:
    """Standard output and error of a command that must end with `status`."""
    capfd.readouterr()
    ended = run(list(words))
    out, err = capfd.readouterr()
    assert ended == status, err
    return out, err


def reported(capfd: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """The report of a command that must succeed."""
    return json.loads(told(capfd, *words, "--json")[0])
