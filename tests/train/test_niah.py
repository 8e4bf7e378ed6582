"""Needles in haystacks: position, answer and length."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from helpers.tiny_run import write_documents
from mc_core.errors import UserError
from train.config.recall_schema import NIAHConfig
from train.tasks.niah import NOISE, Needles

NEEDLE = re.compile(r"One of the special magic (numbers|UUIDs) for ([a-z]+-[a-z]+) is: (\S+)\. ")
LONGEST = max(map(len, NOISE))


def text_of(example) -> str:
    return bytes(example.tokens.astype(np.uint8)).decode()


@settings(deadline=None)
@given(
    st.sampled_from(["number", "uuid"]),
    st.integers(260, 900),
    st.integers(0, 39),
    st.integers(0, 2**31),
)
def test_needle_is_at_its_depth_and_its_value_is_the_answer(value, length, depth, index):
    draw = Needles(NIAHConfig(value=value), 256, seed=1).draw(length, depth)
    example = draw("test", index)
    text = text_of(example)
    assert len(text) == length
    (found,) = NEEDLE.finditer(text)
    kind, key, told = found.groups()
    assert re.fullmatch(r"\d{7}" if value == "number" else r"[0-9a-f-]{36}", told)
    assert kind == {"number": "numbers", "uuid": "UUIDs"}[value]
    question = f"\nWhat is the special magic {kind[:-1]} for {key}? It is:"
    assert text[found.end() :].endswith(f"{question} {told[:-1]}")
    assert bytes(example.labels.astype(np.uint8)).decode() == f" {told}"
    assert example.weights.all()
    assert example.places.tolist() == list(range(length - 1 - len(told), length))
    size = length - len(found[0]) - len(question) - len(told)
    assert set(example.origins) == {found.start()}
    assert abs(found.start() - size * depth / 39) <= LONGEST / 2
    assert found.start() == (0 if depth == 0 else size if depth == 39 else found.start())
    hay = text[: found.start()] + text[found.end() : text.index(question)]
    assert hay in "".join(NOISE) * 30


def test_depth_is_random_by_default():
    draw = Needles(NIAHConfig(depths=4), 256, seed=0).draw(600)
    places = {int(draw("train", i).origins[0]) for i in range(200)}
    near = {round(3 * place / 470) for place in places}
    assert near == {0, 1, 2, 3}


def test_examples_are_independent():
    """Equal split and index give equal examples; different ones give different examples."""
    needles = [Needles(NIAHConfig(), 256, seed) for seed in (0, 0, 1)]
    drawn = [
        text_of(one.draw(300, depth)(split, index))
        for one in needles
        for depth in (None, 0, 1)
        for split in ("train", "test")
        for index in (0, 1)
    ]
    assert drawn[:12] == drawn[12:24]
    assert len(set(drawn)) == 24


def test_essays_exclude_held_out_text(tmp_path):
    folder = write_documents(tmp_path / "text")
    config = NIAHConfig("essay", corpus=(str(folder),), validation_fraction=0.3, depths=3)
    needles = Needles(config, 256, seed=0)
    documents = [file.read_text() for file in folder.iterdir()]
    sides = []
    for split in ("train", "validation", "test"):
        numbers = set()
        for index in range(60):
            text = text_of(needles.draw(700, 2)(split, index))
            hay = text[: NEEDLE.search(text).start()]
            numbers |= {int(x) for x in re.findall(r"(?<![^\n])(\d+): ", hay)}
            assert any(hay[10:60].strip("\n") in one for one in documents) or "\n" in hay[10:60]
        sides.append(numbers)
    assert sides[0]
    assert sides[1]
    assert not sides[0] & (sides[1] | sides[2])


def test_tokenizer_keeps_length_and_pads_answers(tmp_path):
    words = [*"0123456789", "magic", "number", "for", "is", "It", "[UNK]"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    made.save(str(tmp_path / "t.json"))
    config = NIAHConfig(tokenizer=str(tmp_path / "t.json"))
    example = Needles(config, 16, 0).draw(80, 20)("train", 0)
    assert example.tokens.shape == (80,)
    assert example.places.shape == example.labels.shape == (9,)
    assert example.weights.tolist() == [1.0] * 7 + [0.0] * 2
    assert example.places[:7].tolist() == list(range(73, 80))
    origin = int(example.origins[0])
    told = example.tokens[origin:][example.tokens[origin:] < 10][:7]
    assert told.tolist() == example.labels[:7].tolist()
    with pytest.raises(UserError, match=r"model\.vocab_size = 15"):
        Needles(config, 15, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"haystack": "grass"}, "haystack = 'grass': must be one of 'noise', 'essay'"),
        ({"value": "word"}, "value = 'word': must be one of 'number', 'uuid'"),
        ({"lengths": ()}, r"lengths = \[\]: must be at least one"),
        ({"depths": 0}, "depths = 0: must be >= 1"),
    ],
)
def test_impossible_tasks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NIAHConfig(**options)


def test_too_short_lengths_are_refused():
    with pytest.raises(UserError, match=r"data\.lengths = 100: must be > \d+, the tokens of"):
        Needles(NIAHConfig(), 256, 0).draw(100)


@pytest.mark.parametrize(
    ("letters", "message"),
    [("abcdefghijklmnopqrstuvwxyz ", "must have tokens for '7777777'"), ("#", "for 'The river")],
)
def test_tokenizer_must_encode_haystack_and_answer(tmp_path, letters, message):
    """A tokenizer without an unknown token drops characters that are not in its vocabulary."""
    file = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [])).save(str(file))
    with pytest.raises(UserError, match=message):
        Needles(NIAHConfig(tokenizer=str(file)), 256, seed=0).draw(400)
