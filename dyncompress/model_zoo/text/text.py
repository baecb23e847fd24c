"""`text:DIR[?length=64&min_count=1]`: texts in the form that public data sets have.

    {train,valid,test}.txt or .tokens   running text: language modelling (see corpus)
    {train,dev,test}.tsv                labelled sentences: classification (see sentences)
    {train,dev,test}.json, or one FILE  questions with answers in a text, as in SQuAD: reading (see reading)

Words are numbered by what the training split holds; the numbering is kept in `Splits.vocabulary`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from ...errors import RequestError
from ..data.source_text import split_options
from ..data.splits import Splits
from .corpus import load_corpus
from .reading import load_reading
from .sentences import load_sentences
from .words import split_files

Loader = Callable[[Mapping[str, Path], int | None, int, int, str], Splits]

_KINDS: tuple[tuple[str, Loader], ...] = (
    ("txt|tokens", load_corpus),
    ("tsv", load_sentences),
    ("json", load_reading),
)


def load_text(text: str, seed: int) -> Splits:
    """The splits of a folder of texts, or of one SQuAD file; seed decides what the missing splits take from train.

    length: of a window, a sentence or a context, in words; min_count: rarer training words become <unk>.
    Raises RequestError for a folder without such files, and for every mistake in them.
    """
    target, options = split_options(text, ("length", "min_count"))
    name = f"text:{target}"
    length, min_count = (_number(options, key, name) for key in ("length", "min_count"))
    loader, files = _find(Path(target).expanduser(), name)
    return loader(files, length, min_count or 1, seed, name)


def _number(options: Mapping[str, str], key: str, name: str) -> int | None:
    if key not in options:
        return None
    if not (options[key].isdecimal() and int(options[key]) > 0):
        raise RequestError(f"{name}: {key}={options[key]} is no count of words: write {key}=64")
    return int(options[key])


def _find(path: Path, name: str) -> tuple[Loader, Mapping[str, Path]]:
    if path.is_file() and path.suffix == ".json":
        return load_reading, {"train": path}
    if not path.is_dir():
        raise RequestError(f"{name}: there is no such folder: check the path")
    found = [(loader, files) for endings, loader in _KINDS if "train" in (files := split_files(path, endings))]
    if len(found) != 1:
        files_found = ", ".join(files["train"].name for _, files in found) or "no train.txt, train.tsv or train.json"
        raise RequestError(f"{name} holds {files_found}: a folder of texts has just one of these training files")
    return found[0]
