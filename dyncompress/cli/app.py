"""The application: exit statuses, one line for every mistake, and standard output kept clean for --json.

0 done    1 the job failed    2 the request was wrong    130 interrupted
"""

import contextlib
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from ..errors import DynCompressError, RequestError
from .runs.folders import Interrupted

app = App(
    name="dyncompress",
    help="Turns a trained, static PyTorch network into a smaller one, a dynamic one, or both.",
    help_format="plaintext",
    default_parameter=Parameter(negative_iterable=()),
    suppress_keyboard_interrupt=False,
)


def run(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit status. Errors go to standard error as one line, without a traceback."""
    try:
        from . import commands  # noqa: F401 - registers the commands

        with _one_line_warnings():
            app(list(argv), exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, RequestError) as error:
        return _complain(2, str(error))
    except (DynCompressError, OSError) as error:
        return _complain(1, str(error))
    except Interrupted as stop:
        return _complain(130, f"interrupted: continue with {_resume_command(argv, stop.folder)}")
    except KeyboardInterrupt:
        return _complain(130, "interrupted before anything was written")
    except Exception as error:  # a defect, ours or of a model's code: one line, and the whole story on request
        if os.environ.get(_TRACEBACK):
            raise
        reason = (str(error).splitlines() or [""])[0]
        return _complain(1, f"{type(error).__name__}: {reason} (set {_TRACEBACK}=1 to see where)")
    return 0


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Warnings without the line of code that made them."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _complain(status: int, message: str) -> int:
    print(f"dyncompress: {' '.join(message.split())}", file=sys.stderr)
    return status


def _resume_command(argv: Sequence[str], folder: Path) -> str:
    words = [word for word in argv if word not in ("--overwrite", "--resume")]
    if not any(word == "--out" or word.startswith("--out=") for word in words):
        words += ["--out", str(folder)]
    return shlex.join(["dyncompress", *words, "--resume"])


_TRACEBACK = "DYNCOMPRESS_TRACEBACK"
_WIDTH = 120  # of tables in files and pipes


class Printer:
    """Where a command prints: tables on standard output, or with --json on standard error and one object on output."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json
        self._stdout = sys.stdout
        self.console = Console(stderr=as_json, width=None if sys.stdout.isatty() else _WIDTH)

    def result(self, report: dict[str, Any]) -> None:
        """The command's JSON object, where it was asked for."""
        if self._json:
            print(json.dumps(report, indent=2, allow_nan=False), file=self._stdout)


@contextlib.contextmanager
def printing(as_json: bool) -> Iterator[Printer]:
    """A printer; with --json, whatever libraries and user code print goes to standard error."""
    printer = Printer(as_json)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield printer
