"""The house: dependencies point one way, folders are rooms of a sensible size, files hold one idea."""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "dyncompress").rglob("*.py"))
}
TESTS = {path.relative_to(ROOT / "tests"): path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
FLOORS = (("dyncompress.passes",), ("dyncompress.runtime",), ("dyncompress.compress",), ("dyncompress.cli",))
ROOMS_OF_PASSES = ["modules", "graph", "capture", "dims", "axes", "edit", "rewrites", "gates", "exits", "shrink"]


def imported(module: str) -> Iterator[str]:
    """The modules of this package that a module imports, wherever in the file."""
    path = SOURCES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{source}.{alias.name}"
                if (found := name if name in SOURCES else source) in SOURCES and found != module:
                    yield found
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in SOURCES)


IMPORTS: Mapping[str, set[str]] = {module: set(imported(module)) for module in SOURCES}


def folder(module: str) -> str:
    return module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]


def test_no_module_imports_itself_in_a_circle() -> None:
    inner = {module: found for module, found in IMPORTS.items() if module != "dyncompress"}
    try:
        TopologicalSorter(inner).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_folder_imports_another_in_a_circle() -> None:
    """`dims` and its own sub-folder of rules are one room."""
    room = {module: folder(module).replace(".dims.rules", ".dims") for module in SOURCES}
    between: dict[str, set[str]] = {name: set() for name in room.values()}
    for module, found in IMPORTS.items():
        if module != "dyncompress":
            between[room[module]] |= {room[other] for other in found} - {room[module], "dyncompress"}
    try:
        TopologicalSorter(between).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def floor(module: str) -> int | None:
    return next((k for k, names in enumerate(FLOORS) if module.startswith(names)), None)


def test_dependencies_point_down() -> None:
    """cli -> compress -> runtime -> passes; model_zoo stands alone, and only cli reads it."""
    wrong = []
    for module, found in IMPORTS.items():
        for other in found:
            mine, theirs = floor(module), floor(other)
            upward = mine is not None and theirs is not None and theirs > mine
            zoo = other.startswith("dyncompress.model_zoo") and mine is not None and mine < len(FLOORS) - 1
            alone = module.startswith("dyncompress.model_zoo") and theirs is not None
            if upward or zoo or alone:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_rooms_of_passes_import_earlier_ones_only() -> None:
    """In the order of `passes/__init__.py`: a pass reads what is before it."""
    order = {f"dyncompress.passes.{name}": k for k, name in enumerate(ROOMS_OF_PASSES)}

    def room(module: str) -> int | None:
        return next((k for name, k in order.items() if module == name or module.startswith(f"{name}.")), None)

    pairs = [(module, other, room(module), room(other)) for module, found in IMPORTS.items() for other in found]
    assert not [(a, b) for a, b, mine, theirs in pairs if mine is not None and theirs is not None and theirs > mine]
    text = (ROOT / "dyncompress/passes/__init__.py").read_text(encoding="utf-8")
    assert ", ".join(ROOMS_OF_PASSES) in " ".join(text.split())


def test_folders_hold_two_to_thirteen_files() -> None:
    """Without `__init__.py`; a folder that only holds folders may have none."""
    counts = Counter(folder(module) for module, path in SOURCES.items() if path.name != "__init__.py")
    del counts["dyncompress"]
    assert not {name: count for name, count in counts.items() if not 2 <= count <= 13}


def test_every_folder_says_what_it_is() -> None:
    for path in sorted((ROOT / "dyncompress").rglob("__init__.py")):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_no_file_is_over_350_lines() -> None:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in SOURCES.items()}
    assert not {module: length for module, length in lengths.items() if length > 350}


def test_tests_mirror_the_package() -> None:
    """A folder of tests is a folder of the package, so that one finds the tests of a room."""
    folders = {path.parent for path in TESTS if path.name.startswith("test_")}
    assert not [name for name in sorted(folders) if not (ROOT / "dyncompress" / name).is_dir()]


def test_no_test_file_reads_another() -> None:
    """Neither by an import nor as `module:function`; what two of them need is in a module beside this one."""
    names = sorted((path.stem for path in TESTS if path.name.startswith("test_")), key=len, reverse=True)
    other = re.compile(rf"(?:\b(?:from|import) |[\"' =])({'|'.join(names)})(?: import |:|\n)")
    assert not [(str(path), found.group(1)) for path, text in TESTS.items() for found in other.finditer(text)]


def test_no_test_file_is_over_350_lines_nor_a_folder_over_13_files() -> None:
    lengths = {str(path): text.count("\n") for path, text in TESTS.items()}
    assert not {path: length for path, length in lengths.items() if length > 350}
    assert not {str(name): count for name, count in Counter(path.parent for path in TESTS).items() if count > 13}
