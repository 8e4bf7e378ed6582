"""Text data: files, split, and order of the windows."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from helpers.tiny_run import write_documents
from mc_core.errors import UserError
from train.config import RunConfig, TextConfig
from train.data.corpus import load_corpus
from train.data.documents import (
    STDLIB_WITHOUT,
    clip,
    distinct,
    read_documents,
    split,
    stdlib_files,
)
from train.data.windows import Windows, make_batches

texts = st.lists(st.binary(min_size=1, max_size=40), min_size=2, max_size=60)
fractions = st.floats(0.01, 0.99)


@given(texts, fractions)
def test_split_does_not_leak(documents, fraction):
    """Every distinct document is in exactly one split, and no split is empty."""
    kept = distinct(documents)
    if len(kept) < 2:
        return
    train, validation = split(kept, fraction, gap=4)
    assert train
    assert validation
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(set(documents))


@given(texts, texts, fractions)
def test_split_of_a_document_is_stable(documents, others, fraction):
    """The split depends only on the content, not on order, copies or other documents."""
    train, validation = (
        split(distinct(documents), fraction, 4) if len(set(documents)) > 1 else ([], [])
    )
    both = distinct(others + documents[::-1] + documents)
    if len(both) < 2:
        return
    more_train, more_validation = split(both, fraction, 4)
    border = fraction * 2**64
    for side, more, inside in ((train, more_train, False), (validation, more_validation, True)):
        for text in side:
            digest = int(hashlib.sha256(text).hexdigest()[:16], 16)
            if (digest < border) == inside and min(len(more_train), len(more_validation)) > 1:
                assert text in more


def test_the_held_out_share_is_the_fraction():
    documents = distinct(str(number).encode() for number in range(4000))
    _, validation = split(documents, 0.05, gap=0)
    assert 150 < len(validation) < 250


def test_copy_under_another_name_does_not_leak(tmp_path):
    folder = write_documents(tmp_path / "text")
    config = TextConfig(corpus=(str(folder),), window=16, validation_fraction=0.3)
    before = load_corpus(config, 256)
    for file in list(folder.iterdir()):
        (folder / f"copy of {file.name}").write_bytes(file.read_bytes())
    after = load_corpus(config, 256)
    assert before.fingerprint == after.fingerprint
    train = after.train.tobytes()
    for file in folder.iterdir():
        held_out = file.read_bytes() in after.validation
        assert held_out != (file.read_bytes() in train)


def test_single_file_is_split_with_a_gap(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(128)) * 8)
    corpus = load_corpus(TextConfig(corpus=(str(path),), window=24, validation_fraction=0.1), 256)
    text = path.read_bytes()
    assert corpus.validation == text[-102:]
    assert corpus.train.tobytes() == text[: 1024 - 102 - 24]


def test_fingerprint_depends_on_the_text(tmp_path):
    folder = write_documents(tmp_path / "text")
    config = TextConfig(corpus=(str(folder),), window=16)
    before = load_corpus(config, 256).fingerprint
    (folder / "3.txt").write_text("changed")
    assert load_corpus(config, 256).fingerprint != before


def test_stdlib_corpus_excludes_tests():
    files = stdlib_files()
    assert files == sorted(files)
    assert {"json", "asyncio"} <= {file.parent.name for file in files}
    assert not any(STDLIB_WITHOUT & set(file.parts[-3:-1]) for file in files)


def test_limits_apply_to_both_splits(tmp_path):
    folder = write_documents(tmp_path / "text")
    config = TextConfig(
        corpus=(str(folder),), window=16, train_bytes=100, validation_bytes=50,
        validation_fraction=0.3,
    )  # fmt: skip
    corpus = load_corpus(config, 256)
    assert len(corpus.train) == 100
    assert len(corpus.validation) == 50


@given(st.text(min_size=1), st.integers(0, 50))
def test_clip_keeps_whole_characters(text, limit):
    data = text.encode("utf-8", "surrogatepass")
    if b"\xed" not in data:
        kept = clip(data, limit)
        assert len(kept) <= limit
        assert data.startswith(kept)
        assert len(data) <= limit or limit - len(kept) < 4
        kept.decode()


def test_windows_predict_every_token_once():
    windows = Windows(np.arange(50), 7)
    predicted = np.concatenate([windows[i][1:] for i in range(len(windows))])
    assert predicted.tolist() == list(range(1, 50))


def _batches(seed=0, accumulation=2, batch_size=3):
    data = TextConfig(corpus=("x",), window=4)
    run = RunConfig(steps=1, batch_size=batch_size, accumulation=accumulation, seed=seed)
    return make_batches(np.arange(4 * 30 + 1), data, run)


def test_epoch_visits_every_window_once_in_new_order():
    batches = _batches()
    epochs = [[next(batches)[..., 0].ravel() for _ in range(5)] for _ in range(2)]
    first, second = (np.concatenate(epoch) // 4 for epoch in epochs)
    assert sorted(first) == sorted(second) == list(range(30))
    assert list(first) != sorted(first)
    assert list(first) != list(second)
    assert next(batches).shape == (2, 3, 5)


def test_order_depends_on_the_seed():
    same, again, other = (next(_batches(seed)) for seed in (1, 1, 2))
    assert np.array_equal(same, again)
    assert not np.array_equal(same, other)


@pytest.mark.parametrize("taken", [0, 1, 4, 7, 23])
def test_window_position_resumes(taken):
    batches = _batches()
    for _ in range(taken):
        next(batches)
    state = batches.get_state()
    expected = [next(batches) for _ in range(8)]
    fresh = _batches()
    fresh.set_state(state)
    assert np.array_equal(expected, [next(fresh) for _ in range(8)])


def test_tokenizer_file_encodes_the_corpus(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("the memory reads the text " * 40)
    corpus = load_corpus(TextConfig(corpus=(str(path),), tokenizer=tokenizer, window=8), 4)
    assert corpus.train[:5].tolist() == [1, 2, 3, 1, 0]
    assert corpus.encode(b"reads the").tolist() == [3, 1]


def test_tokenizer_must_fit_the_model(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("the memory " * 40)
    config = TextConfig(corpus=(str(path),), tokenizer=tokenizer, window=8)
    with pytest.raises(UserError, match=r"model\.vocab_size = 3: .*needs at least 4"):
        load_corpus(config, 3)
    path.write_bytes(b"the \xff memory " * 40)
    with pytest.raises(UserError, match="needs UTF-8 text"):
        load_corpus(config, 4)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({}, r"data\.tokenizer = .*tokenizer\.json: has no tokens"),
        ({"the": 0}, r"data\.tokenizer: cannot encode the text: .*UNK"),
    ],
)
def test_tokenizers_that_cannot_encode_are_refused(tmp_path, vocabulary, message):
    """Without an unknown token, the library raises a bare Exception at unknown words."""
    path, file = tmp_path / "text.txt", tmp_path / "tokenizer.json"
    path.write_text("the memory " * 40)
    Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")).save(str(file))
    with pytest.raises(UserError, match=message):
        load_corpus(TextConfig(corpus=(str(path),), tokenizer=str(file), window=8), 4)


def test_folders_are_read_recursively_without_hidden_files(tmp_path):
    (tmp_path / "a" / ".git").mkdir(parents=True)
    (tmp_path / "a" / ".git" / "x").write_text("hidden")
    (tmp_path / "a" / "b.txt").write_text("seen")
    (tmp_path / "a" / "empty.txt").touch()
    assert list(read_documents([str(tmp_path)])) == [b"seen"]


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    for name, words in (
        ("nowhere.txt", "no such file"),
        ("empty.txt", "is empty"),
        ("folder", "no file with text"),
    ):
        with pytest.raises(UserError, match=f"{name}: .*{words}"):
            list(read_documents([str(Path(tmp_path, name))]))
