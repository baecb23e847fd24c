"""Labelled sentences: {train,dev,test}.tsv, with GLUE's header or without one."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ...errors import RequestError
from ..data.arrays import count_classes
from ..data.splits import ArrayDataset, LabelledDataset, Splits, divide
from .words import CLASS, PADDING, UNKNOWN, Vocabulary, padded, read_lines, words

_TEXT_NAMES = ("sentence", "text")
_LABEL_NAME = "label"

Row = tuple[str, str]  # sentence, label


def load_sentences(files: Mapping[str, Path], length: int | None, min_count: int, seed: int, name: str) -> Splits:
    """Word ids (T,), filled up with 0, and the number of the label, by `class_names`.

    T is `length`, or else one more than the longest training sentence: every sentence starts with <cls>, and is cut
    after T. Without test.tsv, dev.tsv is the test split. Labels that are all whole numbers keep their order, others are
    sorted. Raises RequestError for lines and headers that do not fit, and labels that train does not have.
    """
    rows = {part: _read(path) for part, path in files.items()}
    if "test" not in rows and "calibration" in rows:
        rows["test"] = rows.pop("calibration")
    class_names = _class_names(rows["train"])
    number = {label: index for index, label in enumerate(class_names)}
    texts: list[list[str]] = []
    parts: dict[str, LabelledDataset] = {}
    for part, found in rows.items():
        for _, label in found:
            if label not in number:
                known = ", ".join(class_names[:5])
                raise RequestError(f"{name}: {part} label {label!r} is not in {files['train'].name}, which has {known}")
        places = torch.arange(len(texts), len(texts) + len(found))
        parts[part] = ArrayDataset(places, torch.tensor([number[label] for _, label in found]))
        texts += [words(sentence) for sentence, _ in found]
    classes = count_classes({part: data.labels for part, data in parts.items()}, name)
    return _numbered(divide(parts, classes, name, seed), texts, length, min_count, class_names)


def _numbered(
    splits: Splits, texts: Sequence[Sequence[str]], length: int | None, min_count: int, class_names: tuple[str, ...]
) -> Splits:
    """Word ids in place of the places of the sentences in `texts`."""
    chosen: dict[str, tuple[list[Sequence[str]], ArrayDataset]] = {}
    for part, data in splits.items():
        assert isinstance(data, ArrayDataset)
        chosen[part] = [texts[place] for place in data.inputs.tolist()], data
    training = chosen["train"][0]
    counts = Counter(word for text in training for word in text)
    vocabulary = Vocabulary.of(counts, (PADDING, UNKNOWN, CLASS), min_count)
    length = length or 1 + max(map(len, training))
    start = vocabulary.ids[CLASS]
    made = {
        part: ArrayDataset(padded([[start, *vocabulary.encode(text)] for text in found], length), data.labels)
        for part, (found, data) in chosen.items()
    }
    return Splits(
        **made, classes=splits.classes, name=splits.name, vocabulary=vocabulary.words, class_names=class_names
    )


def _read(path: Path) -> list[Row]:
    lines = read_lines(path)
    first = [title.strip().lower() for title in lines[0].split("\t")]
    titles = [title for title in (*_TEXT_NAMES, _LABEL_NAME) if title in first]
    if not titles:
        text, label, width, start = 0, 1, 2, 0
    elif len(titles) == 2 and titles[1] == _LABEL_NAME:
        text, label, width, start = first.index(titles[0]), first.index(_LABEL_NAME), len(first), 1
    else:
        raise RequestError(
            f"{path} has the columns {', '.join(first)}: it needs `sentence` or `text`, and `label`; leave out a file "
            "without labels"
        )
    rows = []
    for number, line in enumerate(lines[start:], start=start + 1):
        fields = line.split("\t")
        if len(fields) != width or not fields[text].strip() or not fields[label].strip():
            raise RequestError(
                f"{path} line {number} has {len(fields)} fields, some perhaps empty: write {width} separated by tabs"
                + (", sentence and label" if not titles else "")
            )
        rows.append((fields[text], fields[label].strip()))
    if not rows:
        raise RequestError(f"{path} holds nothing but its header: give at least ten samples")
    return rows


def _class_names(rows: Sequence[Row]) -> tuple[str, ...]:
    labels = {label for _, label in rows}
    numeric = all(label.isdecimal() for label in labels)
    return tuple(sorted(labels, key=int) if numeric else sorted(labels))
