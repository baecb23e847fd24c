"""The command line: parse, call, print. Every command is one public function away."""

import sys


def main() -> None:
    """Runs `dyncompress` with the arguments of the process and exits with its status."""
    from .main import run

    sys.exit(run(sys.argv[1:]))
