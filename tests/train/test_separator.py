"""Separators between documents, in training and in evaluation."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from helpers.tiny_run import TINY, fails, mc, write_config
from mc_core.errors import UserError
from mc_core.tree_utils import flatten
from train.config import TextConfig, from_dict, load_config, to_dict
from train.data.corpus import load_corpus

# Two of these are held out by their SHA-256, also if "", "\r\n" or "</s>\n" is appended.
TEXTS = ("first it was", "held out maybe", "second begins", "and on")


@pytest.fixture
def folder(tmp_path):
    """Documents without final newlines."""
    path = tmp_path / "texts"
    path.mkdir()
    for number, text in enumerate(TEXTS):
        (path / f"{number}.txt").write_text(text)
    return path


def save_tokenizer(path, *special: str, vocabulary: tuple[str, ...] = ()) -> str:
    """Save a lossless byte-level tokenizer."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *vocabulary]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.save(str(path))
    return str(path)


def load(folder, vocab_size=300, **keys):
    config = TextConfig(corpus=(str(folder),), window=4, validation_fraction=0.5, **keys)
    return load_corpus(config, vocab_size)


def sides(corpus):
    """The documents of both splits."""
    assert sum(corpus.documents) == len(TEXTS)
    text = corpus.train.tobytes().decode()
    found = sorted((text.index(t), t) for t in TEXTS if t in text)
    return [t for _, t in found]


def test_newline_separates_documents_of_bytes(folder):
    corpus = load(folder)
    train = sides(corpus)
    held_out = [text for text in TEXTS if text not in train]
    assert len(train) == len(held_out) == 2
    assert corpus.train.tobytes().decode() == "\n".join(train)
    assert sorted(corpus.validation.decode().split("\n")) == sorted(held_out)
    assert corpus.validation_tokens().tobytes() == corpus.validation


def test_no_second_newline_is_added(folder):
    for file in folder.iterdir():
        file.write_text(f"{file.read_text()}\r\n")
    corpus = load(folder)
    assert corpus.train.tobytes().count(b"\n") == corpus.validation.count(b"\n") == 2
    assert corpus.fingerprint == load(folder, separator="").fingerprint


@pytest.mark.parametrize(("separator", "expected"), [("", ""), ("\n\n", "\n\n"), ("é", "é")])
def test_given_separator_joins_all_documents(folder, separator, expected):
    corpus = load(folder, separator=separator)
    assert corpus.train.tobytes().decode() == expected.join(sides(corpus))


NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")


@pytest.mark.parametrize("name", NAMES)
def test_end_of_text_token_joins_documents_without_bytes(folder, tmp_path, name):
    corpus = load(folder, tokenizer=save_tokenizer(tmp_path / "t.json", "<pad>", name))
    for tokens in (corpus.train, corpus.validation_tokens()):
        (border,) = np.flatnonzero(tokens == 257)
        parts = [
            corpus.tokenizer.decode(x.tolist()) for x in np.split(tokens, [border, border + 1])
        ]
        assert {parts[0], parts[2]} < set(TEXTS)
    assert corpus.validation.decode() == parts[0] + parts[2]
    assert name in corpus.separator.description


def test_no_second_end_token_is_added(folder, tmp_path):
    for file in folder.iterdir():
        file.write_text(f"{file.read_text()}</s>\n")
    corpus = load(folder, tokenizer=save_tokenizer(tmp_path / "t.json", "</s>"))
    for tokens in (corpus.train, corpus.validation_tokens()):
        assert (tokens == 256).sum() == 2


@pytest.mark.parametrize(
    ("special", "vocabulary", "separator", "expected"),
    [
        (("<|im_end|>", "[SEP]"), (), None, "\n"),  # not end-of-text tokens
        (("<|im_end|>", "[SEP]"), (), "[SEP]", 257),
        ((), ("<eos>",), None, 256),  # not an added token
        (("</s>", "<|endoftext|>"), (), None, 257),
        (("</s>",), (), "", ""),
        (("</s>",), (), " | ", " | "),
        (("</s>",), ("the",), "the", "the"),  # a word is text, even if it is a token
    ],
)
def test_recognized_end_of_text_tokens(folder, tmp_path, special, vocabulary, separator, expected):
    tokenizer = save_tokenizer(tmp_path / "t.json", *special, vocabulary=vocabulary)
    corpus = load(folder, tokenizer=tokenizer, separator=separator)
    if isinstance(expected, int):
        assert (corpus.train == expected).sum() == 1
    else:
        assert not (corpus.train >= 256).any()
        text = corpus.tokenizer.decode(corpus.train.tolist())
        first, second = sorted((t for t in TEXTS if t in text), key=text.index)
        assert text == f"{first}{expected}{second}"
        assert len(corpus.validation) == sum(
            len(t) for t in TEXTS if t not in (first, second)
        ) + len(expected)


def test_byte_limits_cut_documents_and_separators(folder, tmp_path):
    """No separator token remains at the end of a truncated text."""
    tokenizer = save_tokenizer(tmp_path / "t.json", "</s>")
    whole = load(folder, tokenizer=tokenizer)
    border = int(np.flatnonzero(whole.train == 256)[0])
    for limit, ends in ((border - 1, 0), (border, 0), (border + 1, 1)):
        corpus = load(folder, tokenizer=tokenizer, train_bytes=limit)
        assert len(corpus.train) == limit + ends
        assert (corpus.train == 256).sum() == ends
    border = int(np.flatnonzero(whole.validation_tokens() == 256)[0])
    assert len(whole.validation_tokens(border)) == border
    assert len(whole.validation_tokens(border + 2)) == border + 3


def test_separator_token_adds_bits_but_no_bytes(folder, tmp_path, monkeypatch):
    """A fake model needs 2 bits for every token."""
    from train.evaluation import validation as subject
    from train.step import build

    tokenizer = save_tokenizer(tmp_path / "t.json", "</s>")
    data = {"corpus": str(folder), "tokenizer": tokenizer, "window": 4, "validation_fraction": 0.5}
    config = from_dict(TINY | {"data": data, "model": TINY["model"] | {"vocab_size": 1024}})
    monkeypatch.setattr(
        subject, "token_losses", lambda g, p, rest, t: (np.log(4) * (t[:, 1:] >= 0), rest)
    )
    graphdef, state, _ = build(config)
    corpus = load_corpus(config.data, 1024)
    found = subject.make_validation(graphdef, config, corpus)(state.params, state.rest, 10**6)
    size = len(corpus.validation)
    assert found.num_tokens == size + 1
    assert found.bits_per_byte == pytest.approx((2 * size + 10) / size)


def test_checkpoint_without_separator_key_is_compared_by_text(tmp_path):
    """Old runs had no separators; only the fingerprint of the text is compared."""
    from train.checkpoint import Meta, check_same_run

    config = load_config(write_config(tmp_path), [])
    now = Meta(to_dict(config), "text", 0.0)
    old = json.loads(json.dumps(now.config))
    del old["data"]["separator"]
    check_same_run(tmp_path, now._replace(config=old), now)
    check_same_run(tmp_path, now._replace(config=old), now._replace(config=old))
    with pytest.raises(UserError, match=r"other text: .*data\.separator=''"):
        check_same_run(tmp_path, now._replace(config=old), now._replace(fingerprint="other"))
    spaces = to_dict(load_config(tmp_path / "tiny.yaml", ['data.separator="  "']))
    with pytest.raises(UserError, match=r"data.separator was None and is '  '"):
        check_same_run(tmp_path, now, now._replace(config=spaces))


def test_default_separator_is_not_in_fingerprints(tmp_path):
    config = load_config(write_config(tmp_path))
    assert not any("separator" in key for key, _ in flatten(to_dict(config)))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data.separator=</s>", "</s>"),
        ("data.separator=''", ""),
        ('data.separator="\\n\\n"', "\n\n"),
        ("data.separator=null", None),
    ],
)
def test_separator_on_the_command_line(tmp_path, word, expected):
    assert load_config(write_config(tmp_path), [word]).data.separator == expected


def test_separator_must_be_a_string(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path)
    message = "data.separator = ['SEP']: must be of type str"
    fails(config, monkeypatch, capsys, message, "train", config, "data.separator=[SEP]")
    with pytest.raises(ValueError, match=r"separator = '\\udcff': must be text in UTF-8"):
        TextConfig(corpus=("x",), separator="\udcff")


@pytest.mark.slow
def test_report_names_the_separator(folder, tmp_path, monkeypatch, capsys):
    """Old runs are evaluated without separators, as in training."""
    config = write_config(tmp_path)
    words = [f"data.corpus={folder}", "data.window=4", "model.mixers=[attention]"]
    words += ["data.validation_fraction=0.5", "run.steps=3", "run.validate_every=0"]
    run = tmp_path / "runs" / "tiny"
    assert mc(monkeypatch, "train", config, *words, "data.separator=''") == 0
    out = capsys.readouterr().out
    assert out.index("between documents: nothing") < out.index("step 3/3")
    assert out.rindex("between documents: nothing") > out.index("step 3/3")
    assert json.loads((run / "report.json").read_text())["separator"] == "nothing"
    file = run / "checkpoints" / "3" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["config"]["data"]["separator"]
    file.write_text(json.dumps(meta))
    assert mc(monkeypatch, "evaluate", run) == 0
    assert "between documents: nothing" in capsys.readouterr().out
    fails(config, monkeypatch, capsys, "data.separator=''", "train", config, *words)
    assert mc(monkeypatch, "train", config, *words, "data.separator=''") == 0


def test_single_documents_need_no_separator_note(tmp_path):
    from train.evaluation.run_report import TextReport, print_report, text_notes
    from train.evaluation.validation import References

    report = TextReport(
        "x", "m", 1, 1, 1, 1.0, 1.0, 10, "", (1, 1), References(8.0, 1.0, 1.0), "byte", [],
        separator="a newline",
    )  # fmt: skip
    assert text_notes(report) == []
    out = io.StringIO()
    print_report(Console(file=out, width=40), tmp_path / "x", report)
    assert "of 1 document; training: 1 other document\n" in out.getvalue()
