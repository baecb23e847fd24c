"""Writes the table of README.md: what every script shows, the published figures, our own as the JSON files have them.

python benchmarks/readme.py
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from importlib import import_module
from string import Formatter
from types import ModuleType
from typing import Any

from common import HERE, Benchmark

HEAD = "| script | shows | published | here |\n|---|---|---|---|\n"


class Figures(Formatter):
    """Text with `{path/of/keys:format}`, each a value of the JSON that is given as `found`."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        return at(kwargs["found"], field_name), field_name


def at(found: Any, path: str) -> Any:
    """The value under these keys; "" is the whole."""
    keys = path.split("/") if path else []
    return reduce(lambda part, key: part[int(key) if isinstance(part, list) else key], keys, found)


def scripts() -> Iterator[ModuleType]:
    """All that measure or draw."""
    for path in sorted(HERE.glob("*.py")):
        if "\nBENCHMARK = " in path.read_text(encoding="utf-8"):
            yield import_module(path.stem)


def row(benchmark: Benchmark) -> str:
    """A line of the table."""
    ours = ""
    if benchmark.ours:
        found = json.loads((HERE / f"{benchmark.name}.json").read_text(encoding="utf-8"))
        ours = Figures().format(benchmark.ours, found=at(found, benchmark.within))
    return f"| [{benchmark.name}]({benchmark.name}.py) | {benchmark.shows} | {benchmark.published} | {ours} |\n"


def text() -> str:
    """README.md, its table made anew."""
    about = (HERE / "README.md").read_text(encoding="utf-8").partition(HEAD)[0]
    return about + HEAD + "".join(row(script.BENCHMARK) for script in scripts())


if __name__ == "__main__":
    (HERE / "README.md").write_text(text(), encoding="utf-8")
