"""Texts: what is read, how words are numbered, and one line for every mistake."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from data import PUBLIC, refusal, write
from torch.utils.data import DataLoader

from dyncompress.model_zoo import load_data

CORPUS = {"train": "a b a\n\n b <unk> a\nc a b a a\n", "valid": "b zz a b\n a b\n", "test": "a b c a <unk> yy\n"}


def corpus(folder: Path, prefix: str = "", ending: str = "txt", **changed: str) -> str:
    return write(folder, **{f"{prefix}{part}__{ending}": text for part, text in (CORPUS | changed).items()})


@pytest.mark.parametrize(("prefix", "ending"), [("", "txt"), ("ptb__", "txt"), ("wiki__", "tokens")])
def test_windows_follow_each_other_and_labels_are_the_next_words(tmp_path: Path, prefix: str, ending: str) -> None:
    splits = load_data(corpus(tmp_path, prefix, ending) + "?length=4")
    expected = ["a", "b", "a", "<eos>", "<eos>", "b", "<unk>", "a", "<eos>", "c", "a", "b", "a", "a", "<eos>"]
    assert splits.vocabulary == ("<unk>", "a", "<eos>", "b", "c")  # a 7 times, <eos> 4, b 3, c 1
    assert splits.classes == 5
    spelled = [[[splits.vocabulary[i] for i in row] for row in pair] for pair in splits.train]
    assert spelled == [[expected[i : i + 4], expected[i + 1 : i + 5]] for i in (0, 4, 8)]
    assert [splits.vocabulary[i] for i in splits.calibration[0][0]] == ["b", "<unk>", "a", "b"]
    x, y = next(iter(DataLoader(splits.train, batch_size=2)))
    assert x.shape == y.shape == (2, 4) and x.dtype == y.dtype == torch.int64


def test_rare_words_become_one(tmp_path: Path) -> None:
    splits = load_data(corpus(tmp_path, train="a b a c b d\n", test="a b e f g\n") + "?length=3&min_count=2")
    assert splits.vocabulary == ("<unk>", "a", "b")  # even the end of the line occurs once
    assert [y.tolist() for _, y in splits.test] == [[2, 0, 0]]


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"train": "a b c\n"}, "?length=2", "valid.txt holds 1 words that train.txt does not, such as 'zz'"),
        ({}, "", "shorter than a window of 64"),
        ({}, "?length=0", "length=0 is no count"),
        ({}, "?width=4", "is no option here"),
        ({"valid": " \n\n"}, "?length=4", "valid.txt is empty"),
    ],
)
def test_mistakes_in_running_text(tmp_path: Path, changed: dict[str, str], options: str, message: str) -> None:
    assert message in refusal(corpus(tmp_path, **changed) + options)


def test_mistakes_in_a_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(f"text:{tmp_path / 'nothing'}")
    assert "no train.txt, train.tsv or train.json" in refusal(f"text:{tmp_path}")
    source = write(tmp_path, train__txt="a")
    assert "no valid.txt" in refusal(source)
    corpus(tmp_path)
    write(tmp_path, test__txt=b"caf\xe9")
    assert "test.txt is not UTF-8 text, first at byte 3" in refusal(source)
    write(tmp_path, wiki__train__tokens="a")
    assert "train.txt and wiki.train.tokens" in refusal(source)
    (tmp_path / "wiki.train.tokens").unlink()
    write(tmp_path, train__tsv="a\tb")
    assert "train.txt, train.tsv" in refusal(source)


ROWS = [("It's good, good!", "pos"), ("bad", "neg"), ("GOOD film", "pos"), ("a bad, bad film", "neg")] * 5


def table(rows: list[tuple[str, str]], header: str = "", label_first: bool = False) -> str:
    return header + "".join("\t".join(reversed(row) if label_first else row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("header", "label_first"), [("", False), ("sentence\tlabel\n", False), ("label\ttext\n", True), ("\ufeff", False)]
)
def test_sentences_are_numbered_by_the_training_words(tmp_path: Path, header: str, label_first: bool) -> None:
    held_out = [("a bad good awful film indeed , it is", "neg")]
    files = {"train": ROWS, "dev": [("film", "pos")], "test": held_out}
    splits = load_data(write(tmp_path, **{f"{k}__tsv": table(r, header, label_first) for k, r in files.items()}))
    counts = Counter(w for text, _ in ROWS for w in text.lower().replace(",", " ,").replace("!", " !").split())
    order = sorted(counts, key=lambda word: (-counts[word], word))
    assert splits.vocabulary == ("<pad>", "<unk>", "<cls>", *order)
    assert splits.class_names == ("neg", "pos") and splits.classes == 2
    x, y = splits.train[0]
    assert [splits.vocabulary[i] for i in x] == ["<cls>", "it's", "good", ",", "good", "!"] and y == 1
    assert [splits.vocabulary[i] for i in splits.train[1][0]] == ["<cls>", "bad"] + ["<pad>"] * 4
    x, y = splits.test[0]
    assert [splits.vocabulary[i] for i in x] == ["<cls>", "a", "bad", "good", "<unk>", "film"] and y == 0
    assert len(splits.calibration) == 1


def test_without_a_test_file_dev_is_reported_on(tmp_path: Path) -> None:
    rows = [(f"word{i}", str(10 - i % 3)) for i in range(40)]
    source = write(tmp_path, train__tsv=table(rows), dev__tsv=table(rows[:4]))
    splits = load_data(source + "?length=2")
    train, calibration, test = (len(data) for _, data in splits.items())
    assert train + calibration == 40 and calibration in (5, 6, 7) and test == 4
    assert splits.class_names == ("8", "9", "10")
    assert len(splits.vocabulary) == 3 + train  # a word of the calibration split is unknown
    assert {int(x[1]) for x, _ in splits.calibration} == {1}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train": "index\tsentence\n1\ta\n"}, "train.tsv has the columns index, sentence"),
        ({"train": "sentence\tlabel\n"}, "nothing but its header"),
        ({"train": "a b\t1\nc\n"}, "train.tsv line 2 has 1 fields"),
        ({"train": "a b\t1\nc\t2\textra\n"}, "line 2 has 3 fields"),
        ({"train": "sentence\tlabel\na\t1\n\t0\n"}, "line 3 has 2 fields, some perhaps empty"),
        ({"train": table(ROWS), "test": "nice\tfine\n"}, "test label 'fine' is not in train.tsv, which has neg, pos"),
        ({"train": "a\t1\nb\t1\n"}, "two classes or more"),
        ({"train": b"\xff\xfea\t1"}, "not UTF-8"),
    ],
)
def test_mistakes_in_sentences(tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    assert message in refusal(write(tmp_path, **{f"{name}__tsv": text for name, text in files.items()}))


def squad(contexts: list[str], question: str = "Where is it?", answer: str = "Old Town", **changed: Any) -> str:
    """One article for each context."""

    def asked(context: str) -> dict[str, Any]:
        found = {"text": answer, "answer_start": context.find(answer)} | changed
        return {"question": question, "answers": [found, {"text": "x", "answer_start": 0}]}

    unanswerable = {"question": question, "answers": [], "is_impossible": True}
    made = [[{"context": c, "qas": [asked(c), unanswerable]}] for c in contexts]
    return json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": p} for p in made]})


def test_answers_are_stretches_of_words(tmp_path: Path) -> None:
    contexts = ["İn the (Old Town's) east.", "The Old Town, of course"]
    source = write(
        tmp_path, **{"train-v1__1__json": squad(contexts * 10), "dev-v1__1__json": squad(["Not new: Old Town"])}
    )
    splits = load_data(source)
    assert [len(data) for _, data in splits.items()] == [17, 3, 1]
    assert splits.classes == 8  # İn the ( Old Town's ) east .
    (context, question), span = splits.test[0]
    assert [splits.vocabulary[i] for i in context][:5] == ["<unk>", "<unk>", "<unk>", "old", "town"]
    assert [splits.vocabulary[i] for i in question] == ["where", "is", "it", "?"]
    assert span.tolist() == [3, 4]
    spans = {tuple(y.tolist()) for _, y in splits.train}
    assert spans == {(3, 4), (1, 2)}


def test_a_single_file_is_divided_by_articles(tmp_path: Path) -> None:
    write(tmp_path, train__json=squad([f"Town{i} " * i + "Old Town" for i in range(30)]))
    splits = load_data(f"text:{tmp_path / 'train.json'}?length=20")
    lengths = [{int((context > 0).sum()) for (context, _), _ in data} for _, data in splits.items()]
    assert sum(map(len, lengths)) == len(set.union(*lengths)) == 19  # of 30 answers, 11 lie beyond 20 words
    assert splits.classes == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "SQuAD's form, data / paragraphs / qas / answers (KeyError"),
        ("[1]", "SQuAD's form"),
        (squad(["Old Town"], answer_start=3), "answer 'Old Town' is not at its answer_start, 3"),
        (squad(["Old Town"], answer_start=99), "not at its answer_start"),
        (squad(["Old Town"]), "too few articles for a test split"),
        (squad(["a b c Old Town"] * 20), "no train question has its answer in the first 3 words"),
    ],
)
def test_mistakes_in_readings(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(write(tmp_path, train__json=text) + "?length=3")


def test_wikitext_has_its_published_size() -> None:
    folder = PUBLIC / "wikitext2"
    if not folder.is_dir():
        pytest.skip("the data sets are not here")
    splits = load_data(f"text:{folder}?length=1")
    assert len(splits.train) + 1 == 2_088_628 and splits.classes == 33_278


def test_sst2_and_xquad_are_read_whole() -> None:
    if not PUBLIC.is_dir():
        pytest.skip("the data sets are not here")
    splits = load_data(f"text:{PUBLIC / 'sst2'}")
    assert [len(data) for _, data in splits.items()] == [6920, 872, 1821]
    splits = load_data(f"text:{PUBLIC / 'xquad' / 'xquad.en.json'}")
    assert sum(len(data) for _, data in splits.items()) == 1190
