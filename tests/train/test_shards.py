"""Shards as the corpus of a run: tokens, mixtures, held-out text and errors."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.interruptions import quiet, train_until
from helpers.shard_folders import data_of, split_texts, stream_of, write_shards, write_texts
from helpers.tiny_run import TINY, fails, write_config
from helpers.tokenizer_files import byte_level
from train.checkpoint import Checkpoints
from train.config import RunConfig, TextConfig, WeightedCorpus
from train.data.corpus import load_corpus
from train.data.mixture import Mixture
from train.data.windows import make_batches
from train.evaluation.recall_slices import count_ngrams, pack_ngrams
from train.evaluation.run_report import load_report
from train.metrics import read_rows
from train.shards.blocks import BLOCK, Block, BlockWriter, pack_block, token_dtype, unpack_block
from train.shards.plan import ShardOptions
from train.shards.reader import TokenShards


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(0, 2**20), max_size=9),
    st.lists(st.integers(0, 2**32 - 1), max_size=5),
    st.sampled_from([300, 2**16, 2**16 + 1]),
)
def test_record_returns_its_block(tokens, starts, vocab_size):
    dtype = token_dtype(vocab_size)
    assert dtype.itemsize == (2 if vocab_size <= 2**16 else 4)
    block = Block(np.array(tokens, np.int64) % vocab_size, np.array(starts, np.int64))
    found = unpack_block(pack_block(block, dtype), dtype)
    assert found.tokens.dtype == dtype
    assert [x.tolist() for x in found] == [x.tolist() for x in block]


def test_shards_have_the_tokens_and_the_starts_of_the_documents(texts, shards):
    """Slices within a block, over blocks, over shards and past the end equal those of the text."""
    train, held_out = split_texts(texts, 0.3)
    corpus = load_corpus(data_of(shards), 256)
    expected = stream_of(train)
    assert isinstance(corpus.train, TokenShards)
    assert len(corpus.train) == len(expected) > 2 * BLOCK
    starts = np.cumsum([0, *(len(stream_of([text])) for text in train)])[:-1]
    for start in np.random.default_rng(0).integers(0, len(expected), 40):
        for size in (1, 65, BLOCK, len(expected)):
            span = slice(start, start + size)
            np.testing.assert_array_equal(corpus.train[span], expected[span])
            inside = starts[(start <= starts) & (starts < start + size)]
            np.testing.assert_array_equal(corpus.train.document_starts(start, start + size), inside)
    assert corpus.documents == (len(train), len(held_out))
    assert stream_of(held_out).tobytes().startswith(corpus.validation)


def test_threads_read_the_same_tokens_and_ngrams_are_counted(texts, shards):
    corpus = load_corpus(data_of(shards), 256)
    expected = stream_of(split_texts(texts, 0.3)[0])
    starts = np.random.default_rng(1).integers(0, len(expected), 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: corpus.train[start : start + 99], starts))
    for start, tokens in zip(starts, found, strict=True):
        np.testing.assert_array_equal(tokens, expected[start : start + 99])
    wanted = pack_ngrams(corpus.validation_tokens(), 4, 256)
    counts = count_ngrams(corpus.train, wanted, 4, 256)
    np.testing.assert_array_equal(counts, count_ngrams(expected, wanted, 4, 256))
    assert counts.max() > 1


def test_subword_tokens_end_with_the_separator_token(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "t.json"))
    text = write_texts(tmp_path / "text")
    options = ShardOptions(str(tmp_path / "t.json"), validation_fraction=0.3, shard_bytes=20_000)
    write_shards(text, tmp_path / "out", options)
    corpus = load_corpus(
        data_of(tmp_path / "out", tokenizer=str(tmp_path / "out/tokenizer.json")), 300
    )
    train, _ = split_texts(text, 0.3)
    ids = [x for document in train for x in (*tokenizer.encode(document.decode()).ids, 259)]
    assert corpus.train[:].tolist() == ids
    assert corpus.separator.name == "<|endoftext|>"


def test_held_out_documents_are_those_of_the_text(texts, shards):
    """The same documents are scored as if the corpus were read as text."""
    text = load_corpus(data_of(texts), 256)
    tokenized = load_corpus(data_of(shards), 256)
    assert tokenized.validation == text.validation
    assert tokenized.documents == text.documents


@pytest.mark.parametrize(
    "weights", [(0.7, 0.3), (1, 2, 3), (0.001, 0.999), (5,), (1 / 3, 0.2, 1e-9)]
)
def test_every_prefix_of_a_mixture_has_the_shares(weights):
    mixture = Mixture([None] * len(weights), weights)
    places = [mixture.locate(i) for i in range(3000)]
    for number, weight in enumerate(weights):
        keys = [key for part, key in places if part == number]
        assert keys == list(range(len(keys)))
        counts = np.cumsum([part == number for part, _ in places])
        expected = np.arange(1, 3001) * weight / sum(weights)
        assert np.abs(counts - expected).max() < len(weights)
    assert mixture.locate(10**12)[1] == pytest.approx(
        10**12 * weights[mixture.locate(10**12)[0]] / sum(weights), abs=len(weights)
    )


def mixed(shards: Path, tmp_path: Path) -> TextConfig:
    other = tmp_path / "other"
    write_shards(write_texts(tmp_path / "more", seed=1), other)
    parts = (WeightedCorpus(str(shards), 0.75), WeightedCorpus(str(other), 0.25))
    return TextConfig(parts, window=64, validation_fraction=0.3, validation_bytes=8_000)


def test_mixture_is_exact_over_resumption_and_processes(shards, tmp_path):
    """Each batch has the windows of the weights, at any position and for any processes."""
    data = mixed(shards, tmp_path)
    corpus = load_corpus(data, 256)
    run = RunConfig(steps=1, batch_size=8, accumulation=2)

    def batches(own=None):
        return make_batches(corpus.train, data, run, own, corpus.parts)

    whole = batches()
    expected, states = [], []
    for _ in range(30):
        states.append(whole.get_state())
        expected.append(next(whole))
    size = corpus.parts[1].start
    tokens = corpus.train[:]
    for part, count in zip(corpus.parts, (12, 4), strict=True):
        windows = {tokens[i : i + 65].tobytes() for i in range(part.start, part.stop - 64, 64)}
        for batch in expected:
            rows = batch.reshape(-1, 65).astype(tokens.dtype)
            assert sum(row.tobytes() in windows for row in rows) == count
    assert size == len(load_corpus(data_of(shards), 256).train)
    for step in (0, 1, 7, 29):
        for processes in (1, 2, 4):
            parts = []
            for process in range(processes):
                share = batches([*range(process * 8 // processes, (process + 1) * 8 // processes)])
                share.set_state(states[step])
                parts.append(next(share))
            np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected[step])
    assert 4_000 < len(corpus.validation) <= 8_000
    assert corpus.validation.count(b"1 ") >= 1


def test_folders_without_weights_have_the_share_of_their_tokens(shards, tmp_path):
    mixed(shards, tmp_path)
    corpus = load_corpus(data_of(shards, tmp_path / "other"), 256)
    assert [part.weight for part in corpus.parts] == [
        part.stop - part.start for part in corpus.parts
    ]


def shard_config(tmp_path: Path, shards: Path, **keys: object) -> Path:
    data = TINY["data"] | {"corpus": str(shards)} | keys
    run = TINY["run"] | {"directory": str(tmp_path / "runs" / "tiny")}
    return write_config(tmp_path, data=data, run=run)


def test_run_on_shards_resumes_bit_exactly(shards, tmp_path, monkeypatch, no_pictures):
    config = shard_config(tmp_path, shards)
    train_until(8, config, monkeypatch)
    assert "resuming from step 4 of 12" in quiet(config)
    quiet(config, f"run.directory={tmp_path / 'whole'}")
    losses = []
    ends = []
    for run in (tmp_path / "runs/tiny", tmp_path / "whole"):
        losses.append([row["loss"] for row in read_rows(run) if "loss" in row])
        report = load_report(run)
        ends.append((report.bits_per_byte, report.documents, report.validation_sha256))
        with Checkpoints(run) as checkpoints:
            assert checkpoints.latest() == 12
    assert ends[0] == ends[1]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_validation_folder_is_scored(texts, shards, tmp_path):
    """Shards without held-out documents need it; text of the corpus that is in it is dropped."""
    options = ShardOptions(validation_fraction=0, shard_bytes=9_000)
    _, printed = write_shards(texts, tmp_path / "all", options)
    assert "no document is held out: set data.validation" in printed
    other = write_texts(tmp_path / "validation", count=2, seed=5)
    corpus = load_corpus(data_of(tmp_path / "all", validation=(str(other),)), 256)
    assert corpus.documents == (24, 2)
    assert corpus.validation.startswith(b"5 ")
    one = sorted(texts.iterdir())[0]
    text = load_corpus(data_of(texts, validation=(str(one),)), 256)
    assert text.documents == (23, 1)
    assert text.validation == one.read_bytes()
    assert one.read_bytes()[:40] not in text.train.tobytes()


def edit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.corpus=nowhere"], "nowhere: no such file or folder"),
        (["data.corpus=[{path: nowhere, weight: 1}]"], "nowhere: no such folder"),
        (["data.corpus=[{path: SHARDS, weight: 0}]"], "data.corpus[0].weight = 0.0: must be > 0"),
        (["data.corpus=[{path: SHARDS, weight: -1}]"], "data.corpus[0].weight = -1.0: must be > 0"),
        (["data.corpus=[{path: SHARDS, weight: x}]"], "data.corpus[0].weight = 'x': must be"),
        (["data.corpus=[{path: SHARDS}]"], "data.corpus[0]: key 'weight' is missing"),
        (
            ["data.corpus=[SHARDS, {path: SHARDS, weight: 1}]"],
            "a list of paths, or a list of {path",
        ),
        (["data.corpus=[SHARDS, TEXT]"], "not a folder of shards, and the rest of data.corpus has"),
        (["data.corpus=[{path: TEXT, weight: 1}]"], "not a folder of shards, and weights need"),
        (["data.tokenizer=OTHER"], "tokenized with bytes, and data.tokenizer = "),
        (["data.separator=xx"], "data.separator: is 'xx', and "),
        (["data.validation_fraction=0.1"], "must be 0.3, with which "),
        (["data.train_bytes=100"], "data.train_bytes = 100: must be null"),
        (["data.window=1000000"], "needs at least 1000001"),
        (["data.validation=nowhere"], "nowhere: no such file or folder: correct data.validation"),
    ],
)
def test_invalid_data_is_one_line(texts, shards, tmp_path, monkeypatch, capsys, words, message):
    byte_level().save(str(tmp_path / "other.json"))
    config = shard_config(tmp_path, shards)
    names = {"SHARDS": shards, "TEXT": texts, "OTHER": tmp_path / "other.json"}
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    words = ["model.vocab_size=300", *words]
    fails(config, monkeypatch, capsys, message, "train", config, *words)


def test_changed_shards_are_named(texts, tmp_path, monkeypatch, capsys):
    write_shards(texts, tmp_path / "out")
    config = shard_config(tmp_path, tmp_path / "out")
    file = tmp_path / "out/train-00001.array_record"
    content = file.read_bytes()
    edit(file)
    message = "train-00001.array_record: differs from manifest.json (size or SHA-256)"
    fails(config, monkeypatch, capsys, message, "train", config)
    file.write_bytes(content)  # with another modification time
    load_corpus(data_of(tmp_path / "out"), 256)
    file.unlink()
    fails(config, monkeypatch, capsys, "train-00001.array_record: No such file", "train", config)
    (tmp_path / "out/manifest.json").write_text('{"format": "memory-caching-shards-1"}')
    fails(config, monkeypatch, capsys, "manifest.json: not a manifest of shards", "train", config)


def test_block_writer_splits_long_and_short_documents(tmp_path):
    writer = BlockWriter(tmp_path / "a", np.dtype("<u2"))
    sizes = [3 * BLOCK + 5, 0, 1, BLOCK, *[700] * 40]
    for size in sizes:
        writer.add(np.arange(size))
    writer.close()
    assert writer.tokens == sum(sizes)
