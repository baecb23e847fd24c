"""The documentation is true: its links, paths, names, commands and recipes exist, the README's figures are measured."""

import importlib.util
import json
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import dyncompress as dc
from dyncompress.cli import commands  # noqa: F401 - registers the commands
from dyncompress.cli.app import app
from dyncompress.compress.recipes.recipe import read_recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code(text: str) -> Iterator[str]:
    """Fenced and indented blocks, and code in sentences."""
    fenced = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
    yield from fenced.findall(text)
    rest = fenced.sub("", text)
    yield from (re.sub(r"^    ", "", block, flags=re.M) for block in re.findall(r"(?:^    .*\n?)+", rest, re.M))
    yield from re.findall(r"`([^`\n]+)`", rest)


@pages
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith("http")]
    assert not [link for link in local if not (page.parent / link).exists()]


@pages
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    whole = re.findall(r"\b((?:dyncompress|tests|benchmarks|examples|docs)/[\w./-]*)", text)
    names = {
        path.name for folder in ("dyncompress", "tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")
    }
    bare = re.findall(r"`([\w-]+\.py)`", text)
    missing = [path for path in whole if not (ROOT / path.rstrip(".")).exists()]
    assert not missing + [name for name in bare if name not in names]


@pages
def test_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    public = {name for name in re.findall(r"\bdc\.([A-Za-z_]\w*)", text) if name not in dc.__all__}
    assert not public | {name for name in re.findall(r"\bdyncompress(?:\.\w+)+", text) if not exists(name)}


def exists(name: str) -> bool:
    """Whether a dotted name is a module of the package, or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_the_reference_lists_what_is_public() -> None:
    text = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`dc\.(\w+)`", text)) == set(dc.__all__)


@pages
def test_commands_parse(page: Path) -> None:
    for block in code(page.read_text(encoding="utf-8")):
        for line in re.findall(r"^dyncompress .*", block, re.M):
            words = shlex.split(line, comments=True)
            if len(words) > 2 and not {"COMMAND", "..."} & set(words):
                app.parse_args(words[1:], exit_on_error=False, print_error=False)


def test_the_reference_lists_the_commands() -> None:
    text = (ROOT / "docs/reference/command-line.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)[ `]", text, re.M)) == {name for name in app if not name.startswith("-")}


@pages
def test_recipes_read(page: Path, tmp_path: Path) -> None:
    for block in code(page.read_text(encoding="utf-8")):
        if block.startswith("model: "):
            (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
            read_recipe(tmp_path / "recipe.yaml")


def test_the_picture_is_what_its_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("flow", ROOT / "docs/flow.py")
    assert spec is not None and spec.loader is not None
    flow = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flow)
    assert flow.picture() == (ROOT / "docs/flow.svg").read_text(encoding="utf-8")


def test_the_figures_of_the_readme_are_measured() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    demo, coverage, peer = (
        json.loads((ROOT / f"benchmarks/{name}.json").read_text(encoding="utf-8"))
        for name in ("demo", "coverage", "vs_torch_pruning")
    )
    report, clock = demo["report"], demo["wall_clock_ratio"]
    assert f"{report['dynamic']['accuracy']:.1%}".replace("%", " %") + " against the static" in text
    assert f"the static {report['static']['accuracy']:.1%}".replace("%", " %") in text
    assert f"at {demo['macs_ratio']:.0%}".replace("%", " %") + " of its multiply-adds" in text
    assert f"{clock['1']:.2f} of its wall clock at batch 1 and {clock['256']:.2f} at batch 256" in text
    models = coverage["models"]
    assert all(model["ok"] for model in models) and f"All {len(models)} models" in text
    assert f"halves {peer['summary']['managed']['torch_pruning']} of them" in text
