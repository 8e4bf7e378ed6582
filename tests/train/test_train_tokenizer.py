"""`mc tokenizer train`, and the source code of installed packages as a corpus."""

import hashlib
import json
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer

from helpers.tiny_run import fails, mc, write_config, write_documents
from helpers.tokenizer_files import TEXT
from train.config import TextConfig, load_config
from train.data.corpus import load_corpus
from train.data.documents import first_documents, package_files, read_documents
from train.data.train_tokenizer import (
    SMALLEST,
    SPECIAL,
    CorpusOptions,
    select_documents,
    train_for_config,
)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Installed packages: only the two files of `seen` are part of the corpus."""
    root = tmp_path / "site-packages"
    for name, text in (
        ("b/__init__.py", b"second"),
        ("a.py", b"first"),
        ("b/copy.py", b"first"),
        ("b/empty.py", b""),
        ("b/latin.py", b"# -*- coding: latin-1 -*- \xe9"),
        ("b/tests/test_b.py", b"test"),
        ("b/data.txt", b"text"),
        ("__editable___c_finder.py", b"path"),
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    paths = {"purelib": str(root), "platlib": str(root)}
    monkeypatch.setattr(sysconfig, "get_path", paths.__getitem__)
    return root


def test_packages_are_a_corpus_in_fixed_order(packages):
    """Tests, other encodings and files of editable installs are not part of it."""
    names = [file.relative_to(packages).as_posix() for file in package_files()]
    assert names == ["a.py", "b/__init__.py", "b/copy.py", "b/empty.py"]
    assert list(read_documents(["site-packages"])) == [b"first", b"second", b"first"]


def test_packages_are_split_by_document(packages):
    """Copies count once; the fingerprint identifies the text."""
    config = TextConfig(corpus=("site-packages",), window=2, validation_fraction=0.5)
    corpus = load_corpus(config, 256)
    assert corpus.documents == (1, 1)
    assert {corpus.train.tobytes(), corpus.validation} == {b"first", b"second"}
    (packages / "a.py").write_bytes(b"other")
    assert load_corpus(config, 256).fingerprint != corpus.fingerprint


@pytest.mark.parametrize(
    ("limit", "count"), [(None, 3), (1, 1), (3, 1), (4, 2), (6, 2), (7, 3), (99, 3)]
)
def test_first_documents_reach_the_limit(limit, count):
    documents = [b"abc", b"def", b"ghi"]
    assert first_documents(documents, limit) == documents[:count]


def make(folder: Path, name: str, *words: str) -> tuple[Path, list[str]]:
    """Write a configuration whose tokenizer does not exist yet."""
    overrides = [f"data.tokenizer={folder / 'made' / name}", "model.vocab_size=280", *words]
    return folder / "made" / name, overrides


def test_trained_tokenizer_serves_a_run(tmp_path, monkeypatch, capsys):
    """The same text gives the same file; decoding returns every text."""
    config = write_config(tmp_path)
    path, words = make(tmp_path, "a.json")
    assert mc(monkeypatch, "tokenizer", "train", config, *words) == 0
    out = capsys.readouterr().out
    assert "a.json: 280 tokens, trained on " in out
    assert " bytes per token of the held-out text" in out
    other, again = make(tmp_path, "b.json")
    assert mc(monkeypatch, "tokenizer", "train", config, *again) == 0
    assert path.read_bytes() == other.read_bytes()
    tokenizer = Tokenizer.from_file(str(path))
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT
    corpus = load_corpus(load_config(config, words).data, 280)
    assert corpus.separator.name == SPECIAL
    assert corpus.round_trip.exact
    assert len(corpus.validation_tokens()) < len(corpus.validation)


def test_held_out_documents_are_not_read(tmp_path):
    """A further held-out document, of pairs of letters that would be merged, changes nothing."""
    config = write_config(tmp_path)
    path, words = make(tmp_path, "a.json")
    loaded = load_config(config, words)
    before = train_for_config(loaded, Console(quiet=True)).tokenizer.to_str()
    path.unlink()
    texts = (b"%d" % i + 500 * b" zz" for i in range(1000))
    # A share of 0.3 is held out, by hash.
    text = next(text for text in texts if hashlib.sha256(text).hexdigest() < "4")
    (tmp_path / "text" / "more.txt").write_bytes(text)
    assert train_for_config(loaded, Console(quiet=True)).tokenizer.to_str() == before
    held_out = load_corpus(replace(loaded.data, validation_bytes=10**6), 280).validation
    assert text in held_out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "data.tokenizer = bytes: set it to the path of the new tokenizer.json"),
        (["data.tokenizer={config}"], "tiny.yaml: already exists: delete it, or set another"),
        (
            ["data.tokenizer=x.json"],
            f"model.vocab_size = 256: must be >= {SMALLEST}: all bytes and <|endoftext|>",
        ),
        (["data.tokenizer=x.json", "data.corpus=nowhere", "model.vocab_size=300"], "no such file"),
    ],
)
def test_wrong_use_is_refused(tmp_path, monkeypatch, capsys, words, message):
    config = write_config(tmp_path)
    given = [word.format(config=config) for word in words]
    fails(config, monkeypatch, capsys, message, "tokenizer", "train", config, *given)


def test_tokenizer_of_a_corpus_ignores_held_out_documents(tmp_path, monkeypatch, capsys):
    """Documents that `mc tokenize` holds out change nothing; lines of JSON are documents."""
    words = ["--vocab-size", 280, "--validation-fraction", 0.3]
    folder = write_documents(tmp_path / "text")
    lines = tmp_path / "lines.jsonl"
    texts = [file.read_text() for file in folder.iterdir()]
    lines.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    made = tmp_path / "a.json"
    assert mc(monkeypatch, "tokenizer", "train", folder, "--out", made, *words) == 0
    assert "a.json: 280 tokens, trained on " in capsys.readouterr().out
    other = tmp_path / "b.json"
    command = ["tokenizer", "train", lines, "--field", "body", "--out", other, *words]
    assert mc(monkeypatch, *command) == 0
    assert made.read_bytes() == other.read_bytes()
    held_out = (b"%d" % i + 500 * b" zz" for i in range(1000))
    text = next(text for text in held_out if hashlib.sha256(text).hexdigest() < "4")
    (folder / "more.txt").write_bytes(text)
    other.unlink()
    assert mc(monkeypatch, "tokenizer", "train", folder, "--out", other, *words) == 0
    assert made.read_bytes() == other.read_bytes()


def test_part_of_a_corpus_is_selected_by_hash(tmp_path):
    folder = write_documents(tmp_path / "text", count=200)
    sizes = [file.stat().st_size for file in folder.iterdir()]
    found = list(select_documents([str(folder)], CorpusOptions(280, train_bytes=sum(sizes) // 4)))
    assert 0.15 < sum(map(len, found)) / sum(sizes) < 0.35
    assert len(list(select_documents([str(folder)], CorpusOptions(280)))) == 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--out", "{folder}/x.json"], "--vocab-size is missing"),
        (["{config}", "--vocab-size", "300"], "--vocab-size = 300: needs --out FILE and a corpus"),
        (["x", "--out", "{config}", "--vocab-size", "300"], "tiny.yaml: already exists"),
        (
            ["x", "--out", "{folder}/x.json", "--vocab-size", "9"],
            "--vocab-size = 9: must be >= 257",
        ),
        (["x", "--out", "{folder}/x.json", "--vocab-size", "300"], "x: no such file or folder"),
    ],
)
def test_wrong_use_with_a_corpus(tmp_path, monkeypatch, capsys, words, message):
    config = write_config(tmp_path)
    given = [word.format(config=config, folder=tmp_path) for word in words]
    fails(config, monkeypatch, capsys, message, "tokenizer", "train", *given)
