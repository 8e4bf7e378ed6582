"""`mc generate`, the sample at the end of a run, and streaming decoders."""

import dataclasses
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helpers.tiny_run import TINY, fails, mc, snapshot, without_pictures, write_config
from mc_core import LinearConfig, MCConfig, ModelConfig
from mc_core.errors import NotFiniteError, UserError
from mc_jax import LanguageModel, generate
from parity.files import write_safetensors
from parity.weights import jax_weights, to_torch
from train.checkpoint import load_run
from train.config import load_config
from train.evaluation.completion import ByteDecoder, Completion, TokenizerDecoder, printable
from train.evaluation.generate import GenerationOptions, Speed, complete, load_source
from train.evaluation.prompts import Prompt, read_prompts
from train.evaluation.run_report import load_report
from train.evaluation.sample import draw_sample
from train.loop import train

SAMPLED = ["--temperature", 1.5, "--top-k", 50, "--top-p", 0.9, "--seed", 3]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run; its output is saved next to its configuration."""
    config = write_config(tmp_path_factory.mktemp("generate"))
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        train(load_config(config, ["run.sample_tokens=30"]), Console(file=out, width=80))
    (config.parent / "stdout.txt").write_text(out.getvalue())
    return config.parent / "runs" / "tiny"


def test_run_ends_with_a_sample(run, monkeypatch, capsys):
    config = run.parents[1] / "tiny.yaml"
    out = (run.parents[1] / "stdout.txt").read_text()
    sample = load_report(run).sample
    prompt, _, text = out.partition(
        "continuation by tiny (30 tokens at temperature 0.8, seed 0):\n"
    )
    assert text == "".join(f"| {line}\n" for line in printable(sample.text).split("\n"))
    assert sample.prompt in prompt
    assert prompt.count("start of the validation text:") == 1
    before = snapshot(run)
    assert mc(monkeypatch, "train", config, "run.sample_tokens=30") == 0
    assert capsys.readouterr().out.strip("\n") in out
    assert snapshot(run) == before
    model, config = load_run(run)[1], load_config(config, ["run.sample_tokens=30"])
    again = draw_sample(model, config, sample.prompt.encode() + b" and more")
    assert again == sample


def test_greedy_text_matches_the_model(run, monkeypatch, capsys):
    assert mc(monkeypatch, "generate", run, "--prompt", "the memory é", "--max-tokens", 12) == 0
    out, err = capsys.readouterr()
    steps = list(generate(load_run(run)[1], [np.frombuffer("the memory é".encode(), np.uint8)], 12))
    assert out == bytes(int(step[0]) for step in steps).decode(errors="replace")
    for words in ("compiled in ", "prompt 13 tokens in ", "new 11 tokens in ", "tokens/s"):
        assert words in err
    assert err.count("\n") == 1


def completion(monkeypatch, capsys, *words: object) -> str:
    assert mc(monkeypatch, "generate", *words) == 0
    return capsys.readouterr().out


def test_seed_determines_text_and_stop_string_ends_it(run, tmp_path, monkeypatch, capsys):
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(b"a long \xff text\n")  # bytes need no UTF-8, and none are stripped
    words = [run, "--prompt-file", prompt, "--max-tokens", 40, *SAMPLED]
    text = completion(monkeypatch, capsys, *words)
    assert text == completion(monkeypatch, capsys, *words)
    assert text != completion(monkeypatch, capsys, *words, "--seed", 4)
    stop = text[11:14]
    cut = completion(monkeypatch, capsys, *words, "--stop", stop, "--stop", "never there")
    assert cut == text[: text.index(stop)]
    output = tmp_path / "out.jsonl"
    assert completion(monkeypatch, capsys, *words, "--stop", stop, "--output", output) == cut
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["prompt"] == "a long \N{REPLACEMENT CHARACTER} text\n"
    assert (row["completion"], row["finish"]) == (cut, "stop")
    assert 14 <= row["tokens"] < 40


@pytest.mark.slow
def test_prompt_lines(run, tmp_path, monkeypatch, capsys):
    """A completion depends neither on other lines nor on the batch size."""
    prompts, texts = tmp_path / "prompts.jsonl", ["the memory", "é", "a token reads\n"]
    prompts.write_text("".join(f"{json.dumps({'prompt': text})}\n\n" for text in texts))
    words = [run, "--prompts", prompts, "--max-tokens", 10]
    rows = [json.loads(line) for line in completion(monkeypatch, capsys, *words).splitlines()]
    assert [row["prompt"] for row in rows] == texts
    for row, text in zip(rows, texts, strict=True):
        alone = completion(monkeypatch, capsys, run, "--prompt", text, "--max-tokens", 10)
        assert row == {"prompt": text, "completion": alone, "tokens": 10, "finish": "length"}
    whole = completion(monkeypatch, capsys, *words, *SAMPLED)
    output = tmp_path / "out.jsonl"
    options = [*SAMPLED, "--batch-size", 2, "--output", output]
    assert completion(monkeypatch, capsys, *words, *options) == ""
    assert output.read_text() == whole


@pytest.mark.slow
def test_weight_file_generates_like_its_run(run, tmp_path, monkeypatch, capsys):
    config, model, *_ = load_run(run)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, config.model, to_torch(jax_weights(model)))
    words = ["--prompt", "every segment", "--max-tokens", 10, "--cache-dtype", "bfloat16"]
    one, other = (completion(monkeypatch, capsys, source, *words) for source in (run, path))
    assert one == other


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --prompt TEXT, --prompt-file FILE, --prompts FILE.jsonl"),
        (["--prompt", "a", "--prompt-file", "b"], "give one of --prompt TEXT"),
        (["--prompt", ""], "--prompt: the prompt is empty"),
        (["--prompt-file", "{folder}/nowhere"], "nowhere: No such file or directory"),
        (["--prompts", "{folder}/empty.jsonl"], "empty.jsonl: no prompt in this file"),
        (["--prompts", "{folder}/bad.jsonl"], "bad.jsonl: line 3: Expecting value"),
        (["--prompts", "{folder}/list.jsonl"], 'line 1: must be an object with the key "prompt"'),
        (["--prompts", "{folder}/key.jsonl"], 'line 2: must be an object with the key "prompt"'),
        (["--prompts", "{folder}/type.jsonl"], "line 1: prompt = 3: must be a string"),
        (["--prompts", "{folder}/half.jsonl"], "line 1: 'utf-8' codec can't encode"),
        (["--prompts", "{folder}/void.jsonl"], "line 1: the prompt is empty"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens = 0: must be >= 1"),
        (["--prompt", "a", "--batch-size", "0"], "batch_size = 0: must be >= 1"),
        (["--prompt", "a", "--temperature", "-1"], "temperature = -1.0: must be finite and >= 0"),
        (["--prompt", "a", "--top-k", "3"], "top_k = 3: needs temperature > 0"),
        (["--prompt", "a", "--temperature", "1", "--top-p", "1.5"], "top_p = 1.5: must be in"),
        (["--prompt", "a", "--seed", "-1"], "seed = -1: must be in 0..4294967295"),
        (["--prompt", "a", "--stop", ""], "stop = '': must have at least one character"),
        (["--prompt", "a", "--cache-dtype", "int8"], "'--cache-dtype'"),
        (["--prompt", "a", "--output", "{folder}/empty.jsonl"], "empty.jsonl: exists"),
        (["--prompt", "a", "--output", "{folder}/no/x"], "its folder does not exist"),
        (["--prompt", "a", "--tokenizer", "{folder}/no.json"], "data.tokenizer = "),
    ],
)
def test_invalid_generate_options_are_refused(run, tmp_path, monkeypatch, capsys, words, message):
    """One line, exit code 2, and nothing on stdout."""
    good = '{"prompt": "a"}\n'
    files = {
        "empty": "\n\n",
        "bad": good + good + '{"prompt": \n',
        "list": "[1]\n",
        "key": good + '{"id": 1, "promt": "b"}\n',
        "type": '{"prompt": 3}\n',
        "half": '{"prompt": "\\ud800"}\n',
        "void": '{"prompt": ""}\n',
    }
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    words = [word.format(folder=tmp_path) for word in words]
    fails(run.parents[1] / "tiny.yaml", monkeypatch, capsys, message, "generate", run, *words)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere: no checkpoint found; must be a run directory"),
        ("nowhere.safetensors", "nowhere.safetensors"),
        ("tiny.yaml", "tiny.yaml: must be a run directory or a .safetensors file"),
    ],
)
def test_invalid_sources_are_refused(run, monkeypatch, capsys, source, message):
    config = run.parents[1] / "tiny.yaml"
    source = config.parent / source
    fails(config, monkeypatch, capsys, message, "generate", source, "--prompt", "a")


def make_model(vocab_size: int = 256, **options: str) -> LanguageModel:
    layer = MCConfig(8, 2, LinearConfig(), segment_size=8, chunk_size=8, **options)
    config = ModelConfig(vocab_size, 1, layer, ffn_width=16, tie_embeddings=False)
    return LanguageModel(config, rngs=nnx.Rngs(0))


def test_weight_file_needs_its_tokenizer(tmp_path, words):
    model, path = make_model(300), tmp_path / "model.safetensors"
    write_safetensors(path, model.config, to_torch(jax_weights(model)))
    with pytest.raises(
        UserError, match="has 300 tokens, and does not declare its tokenizer: pass the tok"
    ):
        load_source(path, None)
    tokenizer = tmp_path / "tokenizer.json"
    words.save(str(tokenizer))
    assert load_source(path, str(tokenizer))[1].get_vocab_size() == words.get_vocab_size()
    assert load_source(path, "bytes")[1] is None


def test_models_that_cannot_stream_are_refused(tmp_path):
    model = make_model(segmentation="logarithmic")
    with pytest.raises(UserError, match="segmentation = 'logarithmic'"):
        complete(model, None, [Prompt("x", b"a")], GenerationOptions(), Speed())
    config = load_config(write_config(tmp_path), ["run.sample_tokens=5"])
    sample = draw_sample(model, config, b"some validation text")
    assert sample.text == ""
    assert sample.note.startswith("no sample: segmentation = 'logarithmic'")


def test_nonfinite_logits_stop_generation():
    model = make_model()
    model.norm.scale.set_value(jnp.full_like(model.norm.scale[...], jnp.nan))
    with pytest.raises(NotFiniteError, match="--prompt: the logits after 0 new tokens are not"):
        complete(model, None, [Prompt("--prompt", b"a")], GenerationOptions(), Speed())


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A tokenizer of letter pairs, with bytes for other text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("Ġ", "t")]
    vocabulary = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_tokenizer_decodes_completions(words):
    """The concatenated pieces equal the text of decoding all tokens at once."""
    model, shown = make_model(words.get_vocab_size()), []
    options = GenerationOptions(40, temperature=3.0, seed=1)
    prompt = Prompt("x", "the thé".encode())
    (row,) = complete(
        model, words, [prompt], options, Speed(), show=lambda _, text: shown.append(text)
    )
    ids = words.encode("the thé").ids
    steps = generate(model, [ids], 40, temperature=3.0, seed=1)
    assert row.text == words.decode([int(step[0]) for step in steps], skip_special_tokens=False)
    assert "".join(shown) == row.text
    assert len(shown) > 20
    with pytest.raises(UserError, match=r"x: .*: a tokenizer needs UTF-8 text"):
        complete(model, words, [Prompt("x", b"\xff")], options, Speed())


def pieces(decoder: object, tokens: list[int], *stops: str, limit: int | None = None) -> list[str]:
    row = Completion(decoder, limit or len(tokens), stops)
    shown = []
    for token in tokens:
        if row.finish is None:
            shown.append(row.push(token))
    assert "".join(shown) == row.text
    return [*shown, row.finish]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"ab", ["a", "b"]),
        ("é€".encode(), ["", "é", "", "", "€"]),
        (b"a\xffb", ["a", "\ufffd", "b"]),
        (b"\xe2\x82b", ["", "", "\ufffdb"]),
        (b"a\xe2\x82", ["a", "", "\ufffd"]),
    ],
)
def test_bytes_decode_whole_characters(text, expected):
    assert pieces(ByteDecoder(), list(text)) == [*expected, "length"]
    assert ByteDecoder().push(256) == "\ufffd"


def test_tokens_decode_whole_characters(words):
    tokens = words.encode("th é 漢").ids
    assert pieces(TokenizerDecoder(words, [5, 6]), tokens) == [
        *("th", " ", "", "é", " ", "", "", "漢"),
        "length",
    ]
    assert pieces(TokenizerDecoder(words, []), tokens[:-1])[-2:] == ["\ufffd", "length"]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("a--b---c", ["---"], ["a", "", "", "--b", "", "", "", "stop"]),
        ("xaab", ["aab"], ["x", "", "", "", "stop"]),
        ("xaaab", ["aab"], ["x", "", "", "a", "", "stop"]),
        ("abc", ["bcd"], ["a", "", "bc", "length"]),
        ("abcde", ["cd", "bcx"], ["a", "", "", "b", "stop"]),
        ("aé!", ["é"], ["a", "", "", "stop"]),
        ("abcd", ["d", "bcd"], ["a", "", "", "", "stop"]),
    ],
)
def test_stop_string_prefix_is_buffered(text, stops, expected):
    assert pieces(ByteDecoder(), list(text.encode()), *stops) == expected


def test_control_characters_are_replaced():
    assert printable("a\x1b[31m\n\té\x07") == "a\ufffd[31m\n\té\ufffd"


def test_prompts_are_not_modified(tmp_path):
    file = tmp_path / "p"
    file.write_bytes(b" \n\xff")
    assert read_prompts(None, file, None) == [Prompt(str(file), b" \n\xff")]
    assert read_prompts("\udcff", None, None) == [Prompt("--prompt", b"\xff")]


def test_reports_without_sample_are_read(run, tmp_path):
    report = load_report(run)
    data = json.loads((run / "report.json").read_text())
    del data["sample"]
    (tmp_path / "report.json").write_text(json.dumps(data))
    assert load_report(tmp_path) == dataclasses.replace(report, sample=None)
    assert TINY["run"]["sample_tokens"] == 0
