"""Reading comprehension in SQuAD's JSON form: the answer to a question is a stretch of a text."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import RequestError
from ..data.splits import CALIBRATION_SHARE, TEST_SHARE, Splits, stratified_split
from .words import PADDING, UNKNOWN, WORD, Vocabulary, padded, read_lines, words


@dataclass(frozen=True)
class Reading:
    """A question about a text, and the numbers of the first and the last word of its answer there."""

    context: str
    question: str
    span: tuple[int, int]


Article = list[Reading]


class Readings(Dataset[tuple[tuple[Tensor, Tensor], Tensor]]):
    """Item i is ((context ids (T,), question ids (J,)), (2,) int64: first and last word of the answer).

    contexts (C, T) int64 holds every text once; sample i reads number rows[i]; questions is (N, J), spans (N, 2).
    """

    def __init__(self, contexts: Tensor, rows: Tensor, questions: Tensor, spans: Tensor) -> None:
        self.contexts, self.rows, self.questions, self.spans = contexts, rows, questions, spans

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (self.contexts[self.rows[index]], self.questions[index]), self.spans[index]


def load_reading(files: Mapping[str, Path], length: int | None, min_count: int, seed: int, name: str) -> Splits:
    """Readers' samples; the classes are the T places in a context, which is filled up with 0 to the longest one.

    With `length`, contexts are cut after so many words, and samples whose answer lies further on are left out, as are
    questions without an answer. Of several answers the first counts. Without a test file, dev is the test split; splits
    that are missing take whole articles from train. Raises RequestError for files of another form.
    """
    articles = _divided({part: _articles(path) for part, path in files.items()}, seed, name)
    parts = {part: [reading for article in found for reading in article] for part, found in articles.items()}
    text_of = {text: words(text) for found in parts.values() for r in found for text in (r.context, r.question)}
    length = length or max((len(text_of[r.context]) for found in parts.values() for r in found), default=1)
    for part, found in parts.items():
        parts[part] = [reading for reading in found if reading.span[1] < length]
        if not parts[part]:
            raise RequestError(f"{name}: no {part} question has its answer in the first {length} words of its text")
    texts = dict.fromkeys(text for r in parts["train"] for text in (r.context, r.question))
    counts = Counter(word for text in texts for word in text_of[text])
    vocabulary = Vocabulary.of(counts, (PADDING, UNKNOWN), min_count)
    asked = max(len(text_of[r.question]) for found in parts.values() for r in found)
    ids = {text: vocabulary.encode(found) for text, found in text_of.items()}
    made = {part: _numbered(found, ids, length, asked) for part, found in parts.items()}
    return Splits(made["train"], made["calibration"], made["test"], length, name, vocabulary=vocabulary.words)


def _divided(articles: Mapping[str, list[Article]], seed: int, name: str) -> dict[str, list[Article]]:
    """All three splits; without a test file, dev is the test split, and what is still missing comes off train."""
    parts = dict(articles)
    if "test" not in parts and "calibration" in parts:
        parts["test"] = parts.pop("calibration")
    for offset, (part, share) in enumerate((("test", TEST_SHARE), ("calibration", CALIBRATION_SHARE))):
        if part not in parts:
            train = parts["train"]
            kept, taken = stratified_split(torch.zeros(len(train)), (1 - share, share), seed + offset)
            parts["train"], parts[part] = [train[i] for i in kept], [train[i] for i in taken]
        if not parts["train"] or not parts[part]:
            raise RequestError(f"{name}: too few articles for a {part} split: give ten or more")
    return parts


def _numbered(found: Sequence[Reading], ids: Mapping[str, list[int]], length: int, asked: int) -> Readings:
    row_of = {context: row for row, context in enumerate(dict.fromkeys(r.context for r in found))}
    return Readings(
        contexts=padded([ids[context] for context in row_of], length),
        rows=torch.tensor([row_of[r.context] for r in found]),
        questions=padded([ids[r.question] for r in found], asked),
        spans=torch.tensor([r.span for r in found]),
    )


def _articles(path: Path) -> list[Article]:
    try:
        content = json.loads("\n".join(read_lines(path)))
        return [list(_readings(article, path)) for article in content["data"]]
    except json.JSONDecodeError as error:
        raise RequestError(f"{path} is not JSON: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RequestError(f"{path} is not in SQuAD's form, data / paragraphs / qas / answers ({reason})") from error


def _readings(article: Any, path: Path) -> Iterator[Reading]:
    for paragraph in article["paragraphs"]:
        context = paragraph["context"]
        places = [match.span() for match in WORD.finditer(context)]
        for asked in paragraph["qas"]:
            if asked["answers"]:
                start, text = asked["answers"][0]["answer_start"], asked["answers"][0]["text"]
                span = _span(places, start, start + len(text))
                if span is None or context[start : start + len(text)] != text:
                    raise RequestError(f"{path}: the answer {text!r} is not at its answer_start, {start}")
                yield Reading(context, asked["question"], span)


def _span(places: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int] | None:
    """The first and the last word that the characters start..end touch."""
    touched = [i for i, (begin, stop) in enumerate(places) if stop > start and begin < end]
    return (touched[0], touched[-1]) if touched else None
