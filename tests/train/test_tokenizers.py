"""Tokenizers: stored settings, losses, and offsets."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from helpers.tiny_run import write_config
from helpers.tokenizer_files import TEXT, byte_level, words
from mc_core.errors import UserError
from train.config import TextConfig, load_config
from train.data.corpus import load_corpus
from train.data.encoded_text import read_text
from train.data.tokenizer import load_encoder, load_tokenizer
from train.evaluation.completion import TokenizerDecoder


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
def test_stored_tokenizer_settings_are_disabled(tmp_path, store):
    """Applies to the corpus, prompts, inspected texts and direct calls of the library."""
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


def test_offsets_cover_trimmed_blanks(tmp_path):
    tokenizer = byte_level()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save(str(tmp_path / "t.json"))
    text = tmp_path / "text.txt"
    text.write_text("a  é  b")
    options = [f"data.tokenizer={tmp_path / 't.json'}", "model.vocab_size=300"]
    read = read_text(text, load_config(write_config(tmp_path), options))
    assert read.spans.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [3, 4], [4, 5], [5, 6], [6, 7]]
    assert read.find("  ").tolist() == [1, 2]


def test_unused_ids_decode_to_replacement_character(tmp_path):
    """A vocabulary may have gaps, so the model can generate an id without a token."""
    made = Tokenizer(models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    made.save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"model\.vocab_size = 5: .*needs at least 6"):
        load_tokenizer(str(tmp_path / "t.json"), 5)
    decoder = TokenizerDecoder(load_tokenizer(str(tmp_path / "t.json"), 6), [0])
    assert [decoder.push(token) for token in (0, 3, 5)] == [" a", "\ufffd", " b"]


def brute_force(one: str, other: str) -> int:
    for size in range(len(one), 0, -1):
        for places in combinations(range(len(one)), size):
            rest = iter(other)
            if all(one[place] in rest for place in places):
                return size
    return 0


@given(st.text("abc", max_size=7), st.text("abc", max_size=9))
def test_longest_common_subsequence(one, other):
    from train.data.round_trip import common_subsequence

    assert common_subsequence(one, other) == brute_force(one, other)


def lose(tokenizer: Tokenizer, *texts: str):
    from train.data.round_trip import check_round_trip

    return check_round_trip(tokenizer, texts, lambda text: tokenizer.encode(text).ids)


def test_lossless_tokenizer_has_no_loss():
    """Including carriage returns, a byte order mark and characters of several tokens."""
    found = lose(byte_level(), "\ufeff" + TEXT, TEXT)
    assert (found.exact, found.lost, found.warning) == (True, 0.0, None)
    prefixed = byte_level()
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found = lose(prefixed, "a text", "another")
    assert (found.exact, found.lost, found.warning) == (False, 0.0, None)


def test_tokenizer_loss_is_measured():
    lower = byte_level()
    lower.normalizer = normalizers.Lowercase()
    found = lose(lower, "The Text is A text. ", "x" * 80)
    assert found.lost == pytest.approx(3 / 100)
    assert "warning: 3% of the characters are lost in decoding" in found.warning
    assert "cannot be compared" in found.warning
    bare = byte_level()
    bare.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    assert lose(bare, "été" + "x" * 17).lost == pytest.approx(2 / 20)
    assert lose(words("a", "b", "UNK"), "a b\nb a \n").lost == pytest.approx(3 / 9)
    # The letters of an unknown word are not those of the word [UNK].
    assert lose(words("a"), "a UNKNOWN").lost == pytest.approx(8 / 9)
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), (" ", -1.0)], 0, False))
    assert lose(unigram, "a unk a").lost == pytest.approx(3 / 7)


def test_loss_after_the_sample_is_reported():
    from train.data.round_trip import SAMPLE

    lower = byte_level(merges=False)
    lower.normalizer = normalizers.Lowercase()
    found = lose(lower, "x" * SAMPLE + "A" + "x" * 99)
    assert found.lost == 1 / (SAMPLE + 100)
    assert found.warning is not None


def test_report_has_tokens_per_byte_and_loss(tmp_path):
    from train.data.round_trip import RoundTrip
    from train.evaluation.run_report import TextReport, load_report, save_report, text_notes
    from train.evaluation.validation import References

    report = TextReport(
        "x", "m", 1, 1, 1, 1.0, 1.0, 1000, "", (2, 2), References(8.0, 1.0, 1.0), "token", [],
        separator="nothing", validation_tokens=250, round_trip=RoundTrip(False, 0.031, 900),
    )  # fmt: skip
    _, warning, rate = text_notes(report)
    assert "0.250 tokens per byte" in rate
    assert "3.1% of the characters" in warning
    assert report.lossy
    save_report(tmp_path, report)
    assert load_report(tmp_path) == report


def test_sweep_names_lossy_rows():
    from helpers.text_sweeps import CONFIG, result
    from train.sweeps.table import make_table

    rows = [result("a", 0, 3.0, 2.0, lost=0.01), result("b", 0, 3.0, 2.0, lost=0.0)]
    (note,) = (note for note in make_table("t", rows, CONFIG).notes if "drops or changes" in note)
    assert note.endswith("so its bits/byte are not comparable: a at 32")
