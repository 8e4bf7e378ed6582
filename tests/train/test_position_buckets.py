"""Loss by position in the window: buckets and report."""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from helpers.tiny_run import TINY, mc, write_config
from train.config import from_dict, load_config
from train.data.corpus import Corpus
from train.evaluation import validation as subject
from train.evaluation.run_report import load_report
from train.loop import train
from train.step import build

pytestmark = pytest.mark.usefixtures("no_pictures")


def spans(buckets: list[dict]) -> list[tuple[int, int]]:
    return [(bucket["start"], bucket["end"]) for bucket in buckets]


def test_buckets_are_means_over_positions():
    """Bits and counts are computed by hand for 3 windows of 40, 40 and 20 tokens."""
    losses = np.array([np.arange(40.0), np.arange(40.0) ** 2, np.full(40, 7.0)])
    real = np.arange(40) < np.array([[40], [40], [20]])
    buckets = subject.by_position((losses * real).sum(0), real.sum(0))
    assert spans(buckets) == [(0, 16), (16, 32), (32, 40)]
    assert [bucket["tokens"] for bucket in buckets] == [48, 36, 16]
    expected = [
        (sum(range(16)) + sum(i * i for i in range(16)) + 16 * 7) / 48,
        (sum(range(16, 32)) + sum(i * i for i in range(16, 32)) + 4 * 7) / 36,
        (sum(range(32, 40)) + sum(i * i for i in range(32, 40))) / 16,
    ]
    assert [bucket["bits"] for bucket in buckets] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (1, [(0, 1)]),
        (16, [(0, 16)]),
        (17, [(0, 16), (16, 17)]),
        (512, [(0, 16), (16, 32), (32, 64), (64, 128), (128, 256), (256, 512)]),
        (600, [(0, 16), (16, 32), (32, 64), (64, 128), (128, 256), (256, 512), (512, 600)]),
    ],
)
def test_bucket_edges_double_up_to_the_window(window, expected):
    ones = np.ones(window)
    assert spans(subject.by_position(3 * ones, ones)) == expected


def test_empty_buckets_are_left_out():
    tokens = (np.arange(64) < 20).astype(int)
    assert spans(subject.by_position(1.0 * tokens, tokens)) == [(0, 16), (16, 32)]


@pytest.mark.parametrize("count", [501, 321, 322])
def test_position_counts_previous_tokens(monkeypatch, count):
    """Token i > 0 of the text is scored once, at position (i - 1) mod window.

    In the fake model, token i has a loss of i bits, so overlaps, gaps and shifts of windows
    change the sums.
    """
    window = 40
    data = {"corpus": "x", "window": window, "validation_fraction": 0.3}
    config = from_dict(TINY | {"data": data, "run": TINY["run"] | {"batch_size": 3}})
    corpus = Corpus(
        train=np.zeros(0), validation=b"x" * count, documents=(1, 1), fingerprint="",
        encode=lambda text: np.arange(len(text)),
    )  # fmt: skip

    def token_losses(graphdef, params, rest, tokens):
        assert tokens.shape == (3, window + 1)
        return math.log(2) * tokens[:, 1:].astype(jnp.float32), rest

    monkeypatch.setattr(subject, "token_losses", token_losses)
    graphdef, state, _ = build(config)
    found = subject.make_validation(graphdef, config, corpus)(state.params, state.rest, count)
    tokens = np.arange(1, count)
    place = (tokens - 1) % window
    np.testing.assert_array_equal(found.tokens, np.bincount(place, minlength=window))
    np.testing.assert_allclose(found.bits, np.bincount(place, tokens, window), rtol=1e-6)
    assert found.bits_per_byte == pytest.approx((tokens.sum() + 8.0) / count, rel=1e-6)
    for bucket in found.positions:
        inside = (place >= bucket["start"]) & (place < bucket["end"])
        assert bucket["tokens"] == inside.sum()
        assert bucket["bits"] == pytest.approx(tokens[inside].mean(), rel=1e-6)


def quiet(config, *words: str):
    return train(load_config(config, words), Console(file=io.StringIO()))


@pytest.mark.slow
def test_report_has_positions(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path)
    report = quiet(config, "data.window=40")
    run = tmp_path / "runs" / "tiny"
    saved = json.loads((run / "report.json").read_text())
    assert saved["positions"] == report.positions
    assert spans(report.positions) == [(0, 16), (16, 32), (32, 40)]
    bits = sum(bucket["tokens"] * bucket["bits"] for bucket in report.positions)
    assert report.unit == "byte"
    assert (bits + 8.0) / report.validation_bytes == pytest.approx(report.bits_per_byte)
    assert sum(bucket["tokens"] for bucket in report.positions) == report.validation_bytes - 1

    assert mc(monkeypatch, "evaluate", run) == 0
    out = capsys.readouterr().out
    table = out[out.index("uniform") :]
    for bucket, words in zip(report.positions, ("0 to 15", "16 to 31", "32 to 39"), strict=True):
        (line,) = (line for line in table.splitlines() if f" {words} " in line)
        assert f" {bucket['bits']:.3f} " in line
        assert f" {bucket['tokens']} " in line
    assert "bits/byte" in table


@pytest.mark.slow
def test_report_without_positions_is_rebuilt(tmp_path):
    config = write_config(tmp_path)
    report = quiet(config)
    path = tmp_path / "runs" / "tiny" / "report.json"
    older = json.loads(path.read_text())
    del older["positions"]
    path.write_text(json.dumps(older))
    assert load_report(path.parent) is None
    assert quiet(config) == report
    assert load_report(path.parent) == report


def test_unit_is_the_tokenizers_token(tmp_path, tokenizer):
    config = write_config(tmp_path)
    report = quiet(config, "run.steps=3", f"data.tokenizer={tokenizer}")
    assert report.unit == "token"
    tokens = sum(bucket["tokens"] for bucket in report.positions)
    bits = sum(bucket["tokens"] * bucket["bits"] for bucket in report.positions)
    assert tokens + 1 < report.validation_bytes
    assert (bits + 8.0) / report.validation_bytes == pytest.approx(report.bits_per_byte)
