"""Words and their numbers, and the files that texts come in."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...errors import RequestError

PADDING, UNKNOWN, CLASS = "<pad>", "<unk>", "<cls>"

WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")  # a word, with what follows an apostrophe, or one punctuation mark

HELD_OUT = {"calibration": ("valid", "validation", "val", "dev"), "test": ("test",)}
SPLIT_NAMES = {"train": ("train",)} | HELD_OUT


def words(text: str) -> list[str]:
    """The lower-case words and punctuation marks of a text."""
    return [word.lower() for word in WORD.findall(text)]


@dataclass(frozen=True)
class Vocabulary:
    """Words by id: special ones first, then the training words, the most frequent first, equals in order of letters."""

    words: tuple[str, ...]
    ids: Mapping[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", {word: index for index, word in enumerate(self.words)})

    @classmethod
    def of(cls, counts: Counter[str], special: Sequence[str], min_count: int) -> "Vocabulary":
        """All words that occur min_count times or more."""
        order = sorted((-count, word) for word, count in counts.items() if count >= min_count and word not in special)
        return cls((*special, *(word for _, word in order)))

    def encode(self, text: Iterable[str]) -> list[int]:
        """The ids of the words, that of UNKNOWN for those it does not have. Raises KeyError where it has no UNKNOWN."""
        return [self.ids[word] if word in self.ids else self.ids[UNKNOWN] for word in text]


def padded(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    """(N, length) int64: every row cut or filled up with 0."""
    table = torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        table[index, : len(row)] = torch.tensor(row[:length], dtype=torch.int64)
    return table


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without line ends. Raises RequestError for an unreadable, empty or mis-encoded one."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text, first at byte {error.start}: save it as UTF-8") from error
    if not text.strip():
        raise RequestError(f"{path} is empty: give at least ten samples")
    return text.removesuffix("\n").replace("\r\n", "\n").split("\n")


def split_files(folder: Path, endings: str) -> dict[str, Path]:
    """The files of the splits by their names, such as train.txt, ptb.train.txt, wiki.train.tokens, train-v1.1.json.

    endings: a regular expression, "txt|tokens". Raises RequestError for two files of one split.
    """
    found: dict[str, Path] = {}
    for part, names in SPLIT_NAMES.items():
        pattern = re.compile(rf"([\w-]+\.)?({'|'.join(names)})(-v[\d.]+)?\.({endings})")
        files = sorted(path for path in folder.iterdir() if path.is_file() and pattern.fullmatch(path.name))
        if len(files) > 1:
            raise RequestError(f"{folder} holds {files[0].name} and {files[1].name}: keep one {part} file")
        if files:
            found[part] = files[0]
    return found
