"""The application object, and where commands print: standard output is kept clean for --json."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from cyclopts import App, Parameter
from rich.console import Console

app = App(
    name="dyncompress",
    help="Turns a trained, static PyTorch network into a smaller one, a dynamic one, or both.",
    help_format="plaintext",
    default_parameter=Parameter(negative_iterable=()),
    suppress_keyboard_interrupt=False,
)
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
