"""`mc inspect`: its output equals the model's own trace."""

import base64
import json
from dataclasses import replace
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from helpers.tiny_run import TINY, mc, without_pictures, write_config
from mc_core.errors import UserError
from train.checkpoint import load_run
from train.config import load_config
from train.data.encoded_text import Text, read_text
from train.evaluation.html_report import make_page
from train.evaluation.inspection_plots import draw_layer
from train.evaluation.needle import find_needle, weigh_needle
from train.evaluation.traces import load_trained, to_json, trace_text

WORDS = "the code is 4711 — naïve <b>text</b> & more\nwhat was the code, then?\n"
DERIVED = ("token_index", "segment_index", "cached_count", "segment_length")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of three steps with two ssc layers, and a text file."""
    folder = tmp_path_factory.mktemp("inspect")
    model = TINY["model"] | {"num_layers": 2}
    model["layer"] = model["layer"] | {"aggregation": "ssc", "ssc_top_k": 1}
    config = write_config(folder, model=model)
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        assert mc(patch, "train", config, "run.steps=3") == 0
    (folder / "text.txt").write_text(WORDS)
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def inspected(run):
    """The same run after `mc inspect` with a needle and JSON, and what was printed."""
    words = ["--text", run.parents[1] / "text.txt", "--needle", "4711"]
    with pytest.MonkeyPatch.context() as patch:
        assert mc(patch, "inspect", run, *words, "--json", run / "numbers.json") == 0
    return run


@pytest.fixture(scope="module")
def found(run):
    """The inspection of 20 tokens."""
    return trace_text(load_trained(run), run.parents[1] / "text.txt", 20)


class Page(HTMLParser):
    """The addresses, the pictures and the shown text of a page."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.tags, self.shown, self.inside = [], set(), "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.add(tag)
        self.addresses += [found[name] for name in ("src", "href") if name in found]
        if tag == "div":
            self.inside = found["class"] == "text"
        if tag == "span":
            self.inside = found.get("class") != "end"

    def handle_data(self, data):
        self.shown += data if self.inside else ""

    def handle_endtag(self, tag):
        self.inside = self.inside and tag == "span"


def test_page_is_self_contained(inspected):
    page = (inspected / "inspect" / "inspect.html").read_text()
    parsed = Page(page)
    pictures = [(inspected / "inspect" / f"layer-{i}.png").read_bytes() for i in range(2)]
    begin = "data:image/png;base64,"
    assert all(address.startswith(begin) for address in parsed.addresses)
    assert [base64.b64decode(x.removeprefix(begin)) for x in parsed.addresses] == pictures
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert "http" not in page.replace("http-equiv", "")
    assert not parsed.tags & {"link", "script", "iframe", "b"}
    assert parsed.shown == WORDS
    assert "at the last token" in page
    assert page.count('class="needle"') == 4
    names = {path.name for path in (inspected / "inspect").iterdir()}
    assert names == {"inspect.html", "layer-0.png", "layer-1.png"}  # and no temporary ones


def test_json_equals_model_inspect(inspected):
    """All fields of the file are bit-equal to `LanguageModel.inspect`."""
    found = json.loads((inspected / "numbers.json").read_text())
    _, model, step, _ = load_run(inspected)
    tokens = np.frombuffer(WORDS.encode(), np.uint8).astype(np.int32)
    assert (found["tokens"], found["step"]) == (tokens.tolist(), step)
    assert "".join(found["pieces"]) == WORDS
    traces = jax.jit(lambda tokens: model.inspect(tokens))(tokens[None])[1]
    for layer, trace in zip(found["layers"], traces, strict=True):
        fields = {name: x for name, x in trace._asdict().items() if x is not None}
        lengths = fields.pop("segment_length")[0].tolist()
        assert lengths == found["segment_lengths"][: len(lengths)]
        counts = np.repeat(range(len(found["segment_lengths"])), found["segment_lengths"])
        assert fields.pop("segment_index").tolist() == counts.tolist()
        assert fields.pop("cached_count").tolist() == counts.tolist()
        assert fields.pop("token_index").tolist() == list(range(len(tokens)))
        fields["recall"] = trace.recall
        assert layer.keys() == fields.keys()
        assert "momentum_norm" not in layer
        for name, x in fields.items():
            expected = np.asarray(x[0])
            np.testing.assert_array_equal(np.asarray(layer[name], expected.dtype), expected)


def test_page_has_the_recall_of_each_head(inspected):
    """The mean over segments whose memory is read: all but the last one."""
    page = (inspected / "inspect" / "inspect.html").read_text()
    assert "<th>recall</th><th>dead</th>" in page
    for layer in json.loads((inspected / "numbers.json").read_text())["layers"]:
        assert np.shape(layer["recall"]) == np.shape(layer["segment_loss_before"])
        for recall, dead in zip(np.mean(layer["recall"][:-1], 0), layer["dead_heads"], strict=True):
            assert f"<td>{recall:.3g}</td><td>{'yes' if dead else ''}</td>" in page


def test_needle_weight_is_the_gate_on_its_segment(inspected):
    """Segments have 8 tokens; 4711 are tokens 12 to 15, in segment 1."""
    found = json.loads((inspected / "numbers.json").read_text())
    needle = found["needle"]
    assert (needle["tokens"], needle["segments"]) == ([12, 13, 14, 15], [1])
    gates = np.asarray([layer["gates"] for layer in found["layers"]])
    np.testing.assert_allclose(needle["last_weight"], gates[:, -1, :, 1], rtol=1e-6)
    np.testing.assert_allclose(needle["mean_weight"], gates[:, 16:, :, 1].mean(1), rtol=1e-5)
    assert needle["last_uniform"] == 1 / (needle["cached"] + 1)


@pytest.mark.slow
def test_printed_summary(inspected, tmp_path, monkeypatch, capsys):
    words = ["--text", inspected.parents[1] / "text.txt", "--tokens", 20, "--output", tmp_path]
    assert mc(monkeypatch, "inspect", inspected, *words) == 0
    out = capsys.readouterr().out
    total = len(WORDS.encode())
    assert f"(step 3, linear + ssc): the first 20 of {total} tokens in 3 segments" in out
    assert str(tmp_path / "inspect.html") in out
    assert "needle" not in out
    assert "recall" in out
    assert (
        Page((tmp_path / "inspect.html").read_text()).shown == WORDS[:18]
    )  # a dash has three bytes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}/nowhere", "--text", "{text}"], "nowhere: no checkpoint found"),
        (["{run}", "--text", "{run}/nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["{run}", "--text", "{empty}"], "empty.txt: the file is empty: use a file with text"),
        (["{run}"], "Missing option '--text'"),
        (["{run}", "--text", "{text}", "--tokens", "0"], "--tokens = 0: must be >= 1"),
        (["{run}", "--text", "{text}", "--needle", "8"], "--needle '8': not in the text"),
        (["{run}", "--text", "{text}", "--needle", ""], "--needle '': not in the text"),
        (
            ["{run}", "--text", "{text}", "--needle", "4711", "--tokens", "15"],
            "not in the first 15 tokens; raise --tokens",
        ),
        (["{run}", "--text", "{text}", "--needle", "then?"], "the last one, which no token reads"),
        (["{run}", "--text", "{text}", "--output", "{empty}"], "empty.txt: File exists"),
    ],
)
def test_invalid_inspect_options_are_refused(run, tmp_path, monkeypatch, capsys, words, message):
    (tmp_path / "empty.txt").touch()
    places = {"run": run, "text": run.parents[1] / "text.txt", "empty": tmp_path / "empty.txt"}
    assert mc(monkeypatch, "inspect", *(word.format(**places) for word in words)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def plain_text(count: int) -> Text:
    place = np.arange(count)
    words = "".join(chr(97 + i) for i in place)
    return Text(words, place, np.stack([place, place + 1], 1), tuple(words), count)


def weighed(last: list[float], aggregation: str = "grm", words: str = "cd"):
    """A needle in one of four segments of two tokens, with equal gates in the last segment."""
    segment, text = np.repeat(np.arange(4), 2), plain_text(8)
    gates = np.full((1, 8, 1, 5), 1 / 5)
    gates[:, 4:6] = np.asarray([0.5, 0.25, 0, 0, 0.25])
    gates[:, 6:] = np.asarray(last)
    tokens = find_needle(text, words, segment, aggregation)
    return weigh_needle(words, tokens, gates, segment, aggregation)


def test_needle_verdicts():
    found = weighed([0.1, 0.6, 0.1, 0, 0.2])
    assert found.verdict.startswith("yes: at the last token 1 of 1 gates point at segment 1; ")
    assert (found.cached, found.last_uniform, found.last_rank.item()) == (3, 0.25, 1)
    assert found.mean_weight.item() == pytest.approx((0.25 + 0.6) / 2)
    assert found.mean_uniform == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert found.first_share.item() == 0.5
    second = weighed([0.4, 0.3, 0.1, 0, 0.2])
    assert second.verdict.startswith("no: at the last token 0 of 1 gates point at segment 1; ")
    assert second.last_rank.item() == 2
    small = weighed([0.0, 0.2, 0.1, 0, 0.7])  # the first of the cached, yet less than uniform
    assert small.last_rank.item() == 1
    assert small.verdict.startswith("no: ")


def test_equal_weights_rank_last_and_residual_gates_are_shares():
    found = weighed([1, 1, 1, 0, 1], "residual")
    assert (found.last_weight.item(), found.last_rank.item()) == (0.25, 3)
    assert found.verdict.startswith("no: this aggregation gives equal weight to all memories; ")


def test_needle_across_segments_counts_in_both():
    found = weighed([0.1, 0.6, 0.1, 0, 0.2], words="bc")
    assert (found.tokens, found.segments, found.where) == ((1, 2), (0, 1), "segments 0, 1")
    assert found.last_weight.item() == pytest.approx(0.7)
    assert found.last_uniform == 0.5
    assert found.mean_uniform == pytest.approx((2 / 3 + 2 / 4) / 2)


def test_needle_needs_cached_memories():
    with pytest.raises(UserError, match="aggregation = 'none' reads no cached memory"):
        weighed([0, 0, 0, 0, 1], "none")


def test_inspection_of_tokenized_text(tmp_path):
    """The concatenated pieces are the text up to the last token, and the needle is found."""
    vocabulary = {"?": 0, "ab": 1, "47": 2, "11": 3, "é": 4}
    words = Tokenizer(models.WordPiece(vocabulary | {"##11": 5}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    loaded = load_config(write_config(tmp_path), [f"data.tokenizer={tmp_path}/tokenizer.json"])
    path = tmp_path / "text.txt"
    path.write_text("ab é 4711 ab\n")
    text = read_text(path, loaded)
    assert text.tokens.tolist() == [1, 4, 2, 5, 1]
    assert text.pieces == ("ab", " é", " 47", "11", " ab")
    assert text.find("4711").tolist() == [2, 3]
    assert text.first(3).find("4711").tolist() == []
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"text.txt: .*a tokenizer needs UTF-8 text"):
        read_text(path, loaded)
    path.write_text(" \n")
    with pytest.raises(UserError, match="returns no token for it"):
        read_text(path, loaded)


def test_page_escapes_the_text(found):
    """A single token may contain a complete HTML tag."""
    pieces = ("<script>&amp;</script>", '"<!--', *found.text.pieces[2:])
    page = make_page(found._replace(text=replace(found.text, pieces=pieces)), [])
    assert Page(page).shown == "".join(pieces)
    assert "script" not in Page(page).tags


def test_nonfinite_model_can_be_inspected(found):
    """Values that are not finite are null in JSON; plots and page are still written."""
    layer = {name: x.copy() for name, x in found.layers[0].items()}
    for name, x in layer.items():
        if x.dtype.kind == "f":
            layer[name][-1:] = np.nan
    found = found._replace(layers=[layer], blocks=(0,))
    numbers = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert numbers["layers"][0]["entropy"][-1] == [None, None]
    assert numbers["layers"][0]["entropy"][0] == layer["entropy"][0].tolist()
    assert draw_layer(layer, found.plan, "layer 0", "ssc").startswith(b"\x89PNG")
    assert "nan" in make_page(found, [])
