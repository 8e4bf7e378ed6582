"""Tokenizers: what a file may have stored, what it loses, and the copy that a run keeps."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from test_cli import fails, snapshot
from tiny import TINY, mc, write_config
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mc_core.errors import UserError
from mc_jax import LanguageModel
from train.checkpoint import load_run
from train.completion import WordDecoder
from train.config import TextConfig, load_config
from train.data import load_corpus, load_encoder, load_tokenizer
from train.sample import Sample
from train.text import read_text

TEXT = "the memory reads the text\r\n\tand é, 漢 and \N{ZERO WIDTH NO-BREAK SPACE} too  \n"


def byte_level(*, merges: bool = True, dropout: float | None = None) -> Tokenizer:
    """A tokenizer that gives back every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("t", "h"), ("th", "e"), ("Ġ", "the")] if merges else []
    vocabulary = {token: i for i, token in enumerate([*letters, *(a + b for a, b in pairs)])}
    made = Tokenizer(models.BPE(vocabulary, pairs, dropout=dropout))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def words(*vocabulary: str) -> Tokenizer:
    """A tokenizer of whole words, which drops blanks and maps all else to [UNK]."""
    names = ["[UNK]", *vocabulary]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def truncate(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(3)


def truncate_left(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(4, stride=2, direction="left")


def pad(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(length=512, pad_id=1)


def pad_to_multiple(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(pad_to_multiple_of=64)


def surround(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="a $A b", special_tokens=[("a", 0), ("b", 1)]
    )


def surround_as_roberta(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.RobertaProcessing(("a", 0), ("b", 1))


def drop_merges(tokenizer: Tokenizer) -> None:
    tokenizer.model.dropout = 0.7


STORED = (
    truncate,
    truncate_left,
    pad,
    pad_to_multiple,
    surround,
    surround_as_roberta,
    drop_merges,
)


@pytest.mark.parametrize("store", STORED)
def test_settings_stored_in_a_file_change_no_token(tmp_path, store):
    """Corpus, prompts and inspected texts, and every call with the library's own defaults."""
    path, file, text = (tmp_path / name for name in ("stored.json", "plain.json", "text.txt"))
    tokenizer = byte_level()
    tokenizer.save(str(file))
    store(tokenizer)
    tokenizer.save(str(path))
    text.write_text(TEXT * 20)
    expected = byte_level().encode(TEXT * 20)
    for _ in range(3):
        assert load_encoder(str(path), 300)(text.read_bytes()).tolist() == expected.ids
    loaded = load_tokenizer(str(path), 300)
    assert loaded.encode("the text").ids == byte_level().encode("the text").ids
    corpora = [
        load_corpus(TextConfig(corpus=(str(text),), tokenizer=str(name), window=16), 300)
        for name in (path, file)
    ]
    assert corpora[0].fingerprint == corpora[1].fingerprint
    config = load_config(write_config(tmp_path), [f"data.tokenizer={path}", "model.vocab_size=300"])
    read = read_text(text, config)
    assert read.tokens.tolist() == expected.ids
    assert "".join(read.pieces) == TEXT * 20
    assert read.spans.tolist() == [list(span) for span in expected.offsets]


def test_offsets_cover_blanks_that_a_file_says_to_trim(tmp_path):
    tokenizer = byte_level()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save(str(tmp_path / "t.json"))
    text = tmp_path / "text.txt"
    text.write_text("a  é  b")
    options = [f"data.tokenizer={tmp_path / 't.json'}", "model.vocab_size=300"]
    read = read_text(text, load_config(write_config(tmp_path), options))
    assert read.spans.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [3, 4], [4, 5], [5, 6], [6, 7]]
    assert read.find("  ").tolist() == [1, 2]


def test_ids_between_the_tokens_are_shown_as_no_character(tmp_path):
    """A vocabulary may have gaps: the model can write an id that stands for nothing."""
    made = Tokenizer(models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    made.save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"model\.vocab_size = 5: .*needs at least 6"):
        load_tokenizer(str(tmp_path / "t.json"), 5)
    decoder = WordDecoder(load_tokenizer(str(tmp_path / "t.json"), 6), [0])
    assert [decoder.push(token) for token in (0, 3, 5)] == [" a", "\ufffd", " b"]


def brute_force(one: str, other: str) -> int:
    for size in range(len(one), 0, -1):
        for places in combinations(range(len(one)), size):
            rest = iter(other)
            if all(one[place] in rest for place in places):
                return size
    return 0


@given(st.text("abc", max_size=7), st.text("abc", max_size=9))
def test_the_longest_common_subsequence(one, other):
    from train.round_trip import common_subsequence

    assert common_subsequence(one, other) == brute_force(one, other)


def lose(tokenizer: Tokenizer, *texts: str):
    from train.round_trip import check_round_trip

    return check_round_trip(tokenizer, texts, lambda text: tokenizer.encode(text).ids)


def test_a_tokenizer_that_gives_everything_back_loses_nothing():
    """Carriage returns, a byte order mark and characters of several tokens included."""
    found = lose(byte_level(), "\ufeff" + TEXT, TEXT)
    assert (found.exact, found.lost, found.warning) == (True, 0.0, None)
    prefixed = byte_level()
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found = lose(prefixed, "a text", "another")
    assert (found.exact, found.lost, found.warning) == (False, 0.0, None)


def test_what_a_tokenizer_loses_is_measured():
    lower = byte_level()
    lower.normalizer = normalizers.Lowercase()
    found = lose(lower, "The Text is A text. ", "x" * 80)
    assert found.lost == pytest.approx(3 / 100)
    assert "warning: 3% of the characters are not given back by decoding" in found.warning
    assert "cannot be compared" in found.warning
    bare = byte_level()
    bare.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    assert lose(bare, "été" + "x" * 17).lost == pytest.approx(2 / 20)
    assert lose(words("a", "b", "UNK"), "a b\nb a \n").lost == pytest.approx(3 / 9)
    # The letters of an unknown word are not those of the word [UNK].
    assert lose(words("a"), "a UNKNOWN").lost == pytest.approx(8 / 9)
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), (" ", -1.0)], 0, False))
    assert lose(unigram, "a unk a").lost == pytest.approx(3 / 7)


def test_a_loss_after_the_sample_is_told():
    from train.round_trip import SAMPLE

    lower = byte_level(merges=False)
    lower.normalizer = normalizers.Lowercase()
    found = lose(lower, "x" * SAMPLE + "A" + "x" * 99)
    assert found.lost == 1 / (SAMPLE + 100)
    assert found.warning is not None


def test_the_report_tells_tokens_per_byte_and_what_is_lost(tmp_path):
    from train.evaluate import References
    from train.report import Report, load_report, save_report, text_notes
    from train.round_trip import RoundTrip

    report = Report(
        "x", "m", 1, 1, 1, 1.0, 1.0, 1000, "", (2, 2), References(8.0, 1.0, 1.0), "token", [],
        separator="nothing", validation_tokens=250, round_trip=RoundTrip(False, 0.031, 900),
    )  # fmt: skip
    _, warning, rate = text_notes(report)
    assert "0.250 tokens per byte" in rate
    assert "3.1% of the characters" in warning
    assert report.lossy
    save_report(tmp_path, report)
    assert load_report(tmp_path) == report


def test_a_sweep_says_which_rows_lose_text():
    from test_text_sweep import CONFIG, result

    from train.sweep.table import make_table

    rows = [result("a", 0, 3.0, 2.0, lost=0.01), result("b", 0, 3.0, 2.0, lost=0.0)]
    (note,) = (note for note in make_table("t", rows, CONFIG).notes if "drops or changes" in note)
    assert note.endswith("compare with no other one's: a at 32")


# The copy that a run keeps.

WORDS = [
    "data.tokenizer=plain.json",
    "run.steps=3",
    "run.validate_every=0",
    "run.sample_tokens=1",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The configuration of a run of two steps on the tokens of a file, relative to its folder."""
    folder = tmp_path_factory.mktemp("made")
    byte_level().save(str(folder / "plain.json"))
    model = TINY["model"] | {"vocab_size": 300, "mixers": ["attention"]}
    config = write_config(folder, model=model)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # Tells which file the sample at the end is decoded with.
        patch.setattr(
            "train.tasks.text.draw_sample",
            lambda model, config, _: Sample("", config.tokenizer, ""),
        )
        assert mc(patch, "train", config, *WORDS) == 0
    return config


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of the run, its configuration and its tokenizer, from which commands are given."""
    copy = Path(shutil.copytree(made.parent, tmp_path / "copy"))
    monkeypatch.chdir(copy)
    return copy


def edit(path: Path) -> None:
    """Exchange two tokens of a file."""
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["e"], vocabulary["o"] = vocabulary["o"], vocabulary["e"]
    path.write_text(json.dumps(data))


def source(run: Path, *tokenizer: str) -> tuple[LanguageModel, Tokenizer]:
    from train.generate import load_source

    return load_source(run, *(tokenizer or (None,)))


@pytest.mark.parametrize("change", [edit, Path.unlink])
def test_a_run_reads_its_own_copy(folder, tmp_path, monkeypatch, change):
    """The file that was named may change, vanish or be out of reach, and the run may move."""
    run, original = folder / "runs" / "tiny", byte_level()
    assert (run / "tokenizer.json").read_bytes() == (folder / "plain.json").read_bytes()
    sample = json.loads((run / "report.json").read_text())["sample"]
    assert sample["text"].endswith("runs/tiny/tokenizer.json")
    change(folder / "plain.json")
    moved = Path(shutil.move(run, tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    _, tokenizer = source(moved)
    assert tokenizer.get_vocab() == original.get_vocab()
    config = load_run(moved)[0]
    (tmp_path / "text.txt").write_text(TEXT)
    tokens = read_text(tmp_path / "text.txt", config).tokens
    assert tokens.tolist() == original.encode(TEXT).ids
    assert source(Path("elsewhere"), str(moved / "tokenizer.json"))[1] is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit, "tokenizer.json (SHA-256 {other}) is not the tokenizer that "),
        (Path.unlink, "tokenizer.json: no such file: it is the run's copy of data.tokenizer = "),
    ],
)
def test_a_copy_that_is_not_the_tokenizer_is_refused(folder, monkeypatch, capsys, change, message):
    from train.kept_tokenizer import hash_of

    run, text = folder / "runs" / "tiny", folder / "text" / "0.txt"
    copy = run / "tokenizer.json"
    change(copy)
    other = hash_of(str(copy))[:12] if copy.exists() else ""
    for command in (
        ("generate", run, "--prompt", "a"),
        ("evaluate", run),
        ("evaluate", run, "--corpus", text),
        ("evaluate", run, "--task", "niah"),
        ("inspect", run, "--text", text),
    ):
        line = message.format(other=other)
        fails(folder / "tiny.yaml", monkeypatch, capsys, line, *command)
    # The right file may be named in its place, and weights need none.
    assert source(run, "plain.json")[1].get_vocab() == byte_level().get_vocab()
    load_run(run, needs_text=False)


def test_another_tokenizer_is_refused(folder, monkeypatch, capsys):
    run = folder / "runs" / "tiny"
    edit(folder / "plain.json")
    for name, shown in (("plain.json", "SHA-256"), ("bytes", "bytes")):
        words = ("generate", run, "--prompt", "a", "--tokenizer", name)
        message = f"--tokenizer {name} ({shown}"
        fails(folder / "tiny.yaml", monkeypatch, capsys, message, *words)


def test_a_run_resumes_with_the_same_tokenizer_alone(folder, monkeypatch, capsys):
    """An edited file is refused, with both named; the same file may have another path."""
    config, run = folder / "tiny.yaml", folder / "runs" / "tiny"
    words = [*WORDS, f"run.directory={run}"]
    (folder / "same.json").write_bytes((folder / "plain.json").read_bytes())
    before = snapshot(run)
    assert mc(monkeypatch, "train", config, *words, "data.tokenizer=same.json") == 0
    assert snapshot(run) == before
    capsys.readouterr()
    # The decoder alone: the tokens of the corpus stay as they are.
    data = json.loads((folder / "plain.json").read_text())
    (folder / "plain.json").write_text(json.dumps(data | {"decoder": None}))
    message = f"was trained with {run}/tokenizer.json (SHA-256 "
    fails(config, monkeypatch, capsys, message, "train", config, *words)
    fails(config, monkeypatch, capsys, "data.tokenizer = plain.json", "train", config, *words)
    (folder / "plain.json").unlink()
    message = f"no such file; the run keeps a copy: set data.tokenizer={run}/tokenizer.json"
    fails(config, monkeypatch, capsys, message, "train", config, *words)
    kept = f"data.tokenizer={run}/tokenizer.json"
    assert mc(monkeypatch, "train", config, *words, kept) == 0


def test_a_run_without_a_copy_reads_the_file_that_it_names(folder, monkeypatch, capsys):
    run = folder / "runs" / "tiny"
    (run / "tokenizer.json").unlink()
    file = run / "checkpoints" / "3" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["tokenizer"]
    file.write_text(json.dumps(meta))
    assert source(run)[1].get_vocab() == byte_level().get_vocab()
    (folder / "plain.json").rename(folder / "moved.json")
    message = "data.tokenizer = plain.json: no such file, and the run keeps no copy of it"
    fails(folder / "tiny.yaml", monkeypatch, capsys, message, "generate", run, "--prompt", "a")
    assert source(run, "moved.json")[1].get_vocab() == byte_level().get_vocab()


def test_a_file_of_weights_knows_its_tokenizer(folder, tmp_path, monkeypatch, capsys):
    """`mc convert` writes its hash; another tokenizer, or bytes, is refused, also in a new run."""
    run, path = folder / "runs" / "tiny", tmp_path / "model.safetensors"
    # Whether the outputs are the same is tested elsewhere, and takes seconds.
    monkeypatch.setattr("parity.convert.outputs", lambda *model: np.ones(1))
    assert mc(monkeypatch, "convert", run, path) == 0
    assert f"keep {run}/tokenizer.json for it" in " ".join(capsys.readouterr().out.split())
    assert source(path, "plain.json")[1].get_vocab() == byte_level().get_vocab()
    with pytest.raises(UserError, match=r"has 300 tokens, and says only its SHA-256"):
        source(path)
    edit(folder / "plain.json")
    for name in ("plain.json", "bytes"):
        with pytest.raises(UserError, match=rf"--tokenizer {name} .*is not the tokenizer that"):
            source(path, name)
    config = folder / "tiny.yaml"
    base = config.read_text()
    config.write_text(base.replace("data:\n", "data:\n  tokenizer: plain.json\n"))
    words = ("convert", path, tmp_path / "new", "--config", config)
    fails(config, monkeypatch, capsys, "data.tokenizer = plain.json (SHA-256", *words)


def test_bytes_need_no_copy(tmp_path):
    from parity.files import write_safetensors
    from parity.weights import jax_weights, to_torch
    from train.convert import tokenizer_of, write_run

    config = load_config(write_config(tmp_path))
    weights = jax_weights(LanguageModel(config.model, rngs=nnx.Rngs(0)))
    write_run(tmp_path / "run", config, weights)
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    assert tokenizer_of(tmp_path / "run", "run") == "bytes"
    assert source(tmp_path / "run")[1] is None
    path = tmp_path / "model.safetensors"
    write_safetensors(path, config.model, to_torch(weights), "bytes")
    assert source(path)[1] is None
    byte_level().save(str(tmp_path / "t.json"))
    for what in (path, tmp_path / "run"):
        with pytest.raises(UserError, match=r"is not the tokenizer that .*\(bytes\)"):
            source(what, str(tmp_path / "t.json"))


def test_a_sweep_refuses_results_of_another_tokenizer(tmp_path):
    from train.sweep.config import SweepConfig, make_runs
    from train.sweep.results import Results

    words("a", "b").save(str(tmp_path / "t.json"))
    write_config(tmp_path)
    rows = ({"data.tokenizer": str(tmp_path / "t.json")},)
    sweep = SweepConfig(tmp_path / "tiny.yaml", str(tmp_path / "sweep"), rows=rows)
    ((run,),) = make_runs(sweep).values()
    results = Results(tmp_path / "sweep")
    row = {"row": run.row, "seed": run.seed, "rate": run.rate, "fingerprint": run.fingerprint}
    results.add(row | {"tokenizer": run.tokenizer})
    assert results.find(run) is not None
    words("b", "a").save(str(tmp_path / "t.json"))
    ((run,),) = make_runs(sweep).values()
    with pytest.raises(UserError, match=r"another tokenizer .*t\.json"):
        results.find(run)
