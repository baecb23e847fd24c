"""Running text for language models: {train,valid,test}.txt or .tokens, as PTB and WikiText-2 have them."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import RequestError
from ..data.splits import Splits
from .words import UNKNOWN, Vocabulary, read_lines

LINE_END = "<eos>"
WINDOW = 64  # words, where the user does not say


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """A text (N,) int64 cut into windows that follow each other; item i is (T ids, the T ids one further on).

    The last words, fewer than T, are left out.
    """

    def __init__(self, stream: Tensor, length: int) -> None:
        self.stream = stream
        self.length = length

    def __len__(self) -> int:
        return max(0, len(self.stream) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} windows, not one numbered {index}")
        start = index * self.length
        return self.stream[start : start + self.length], self.stream[start + 1 : start + self.length + 1]


def load_corpus(files: Mapping[str, Path], length: int | None, min_count: int, seed: int, name: str) -> Splits:
    """Windows of `length` words (64); valid becomes calibration; the classes are the words.

    Words are what blanks separate, as these files are tokenised; every line, also an empty one, ends in <eos>.
    Raises RequestError for a missing split, a text shorter than a window, or held-out words that nothing stands for.
    """
    for part, file in (("calibration", "valid"), ("test", "test")):
        if part not in files:
            raise RequestError(
                f"{name}: there is no {file}.txt beside {files['train'].name}: a language model needs it"
            )
    texts = {part: [w for line in read_lines(path) for w in (*line.split(), LINE_END)] for part, path in files.items()}
    vocabulary = _vocabulary(texts, files, min_count)
    length = length or WINDOW
    made = {part: Windows(torch.tensor(vocabulary.encode(text)), length) for part, text in texts.items()}
    for part, windows in made.items():
        if not len(windows):
            raise RequestError(f"{files[part]} is shorter than a window of {length} words: ask for less with ?length=")
    size = len(vocabulary.words)
    return Splits(made["train"], made["calibration"], made["test"], size, name, vocabulary=vocabulary.words)


def _vocabulary(texts: Mapping[str, list[str]], files: Mapping[str, Path], min_count: int) -> Vocabulary:
    """The training words, with <unk> where the text has it or min_count makes it."""
    counts = Counter(texts["train"])
    rare = sum(count < min_count for count in counts.values())
    vocabulary = Vocabulary.of(counts, (UNKNOWN,) if rare or UNKNOWN in counts else (), min_count)
    for part, text in texts.items():
        unseen = set() if UNKNOWN in vocabulary.ids else set(text) - vocabulary.ids.keys()
        if unseen:
            raise RequestError(
                f"{files[part]} holds {len(unseen)} words that {files['train'].name} does not, such as "
                f"{min(unseen)!r}, and no <unk> stands for them: make one of the rare words with ?min_count=2"
            )
    return vocabulary
