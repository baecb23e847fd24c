"""Benchmarks cannot rot: each script starts and runs on very little, and README.md says what the JSON files do."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = [path for path in sorted(HERE.glob("*.py")) if "\nBENCHMARK = " in path.read_text(encoding="utf-8")]
CHEAP = ("group_lasso", "plots", "pool")
SKIPPED = 77  # the exit status of a script that misses something
HELP_OF_ALL = """
import sys, readme
for script in readme.scripts():
    sys.argv = [script.__name__, "--help"]
    try:
        script.main()
    except SystemExit as end:
        assert end.code == 0, script
"""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=HERE, capture_output=True, text=True)


def test_every_script_says_what_it_is() -> None:
    """Whatever can be run, the README's own script aside, is a Benchmark."""
    runnable = [path for path in sorted(HERE.glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
    assert [path.stem for path in runnable if path not in SCRIPTS] == ["readme"]


def test_every_script_starts() -> None:
    done = run("-c", HELP_OF_ALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  --quick  ") == len(SCRIPTS)
    assert done.stdout.count("[--quick]") == 2 * len(SCRIPTS)  # in the usage and the documentation


def test_readme_holds_the_figures_of_the_json_files() -> None:
    done = run("-c", "import readme; print(readme.text(), end='')")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (HERE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "script",
    [pytest.param(path, id=path.stem, marks=[] if path.stem in CHEAP else pytest.mark.slow) for path in SCRIPTS],
)
def test_runs_quickly(script: Path) -> None:
    """... and leaves the results of the real measurements alone."""
    before = {path: path.read_bytes() for path in HERE.iterdir() if path.is_file()}
    done = run(script, "--quick")
    if done.returncode == SKIPPED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in HERE.iterdir() if path.is_file()} == before
