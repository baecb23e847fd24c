"""Runs a command and says what went wrong in one line.

0 done    1 the job failed    2 the request was wrong    130 interrupted
"""

import contextlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from cyclopts import CycloptsError

from ..errors import DynCompressError, RequestError
from . import commands  # noqa: F401 - registers the commands
from .app import app
from .runs.folders import Interrupted

_TRACEBACK = "DYNCOMPRESS_TRACEBACK"


def run(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit status. Errors go to standard error as one line, without a traceback."""
    try:
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
