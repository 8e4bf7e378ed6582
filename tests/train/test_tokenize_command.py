"""`mc tokenize`: resumption, processes, lines of JSON and errors."""

import gzip
import json
import subprocess
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.interruptions import full_disk
from helpers.shard_folders import data_of, write_shards, write_texts
from helpers.tiny_run import COMMAND, mc, snapshot
from helpers.tokenizer_files import byte_level
from mc_core.errors import UserError
from train.data.corpus import load_corpus
from train.shards import tokenize as command
from train.shards.plan import ShardOptions, Span, read_span


def test_document_that_is_not_text_is_named(tmp_path):
    byte_level().save(str(tmp_path / "t.json"))
    text = write_texts(tmp_path / "text", count=3)
    (text / "02.txt").write_bytes(b"\xff\xfe")
    options = ShardOptions(str(tmp_path / "t.json"), validation_fraction=0)
    with pytest.raises(UserError, match=r"02\.txt: a document: .* a tokenizer needs UTF-8 text"):
        write_shards(text, tmp_path / "out", options)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_interrupted_command_keeps_finished_shards(texts, shards, tmp_path, monkeypatch):
    """The resumed folder equals that of one session byte for byte."""
    write, numbers = command.write_shard, []

    def write_or_end(job):
        if len(numbers) == 2:
            (tmp_path / "out" / ".train-00002.array_record.tmp").write_bytes(b"incomplete")
            raise Killed
        numbers.append(job.number)
        return write(job)

    with monkeypatch.context() as patch:
        patch.setattr(command, "write_shard", write_or_end)
        with pytest.raises(Killed):
            write_shards(texts, tmp_path / "out")
    times = {n: (tmp_path / f"out/train-{n:05d}.array_record").stat().st_mtime_ns for n in numbers}
    with pytest.raises(UserError, match=r"manifest\.json: no such file: mc tokenize writes it at"):
        load_corpus(data_of(tmp_path / "out"), 256)
    _, printed = write_shards(texts, tmp_path / "out")
    assert "keeping 2 of" in printed
    for number, modified in times.items():
        assert (tmp_path / f"out/train-{number:05d}.array_record").stat().st_mtime_ns == modified
    whole, resumed = (snapshot(folder) for folder in (shards, tmp_path / "out"))
    for files in (whole, resumed):
        del files[".checked.json"]  # has modification times
    assert whole == resumed
    assert "already complete" in write_shards(texts, tmp_path / "out")[1]


@pytest.mark.slow
def test_processes_write_the_same_shards(texts, shards, tmp_path):
    write_shards(texts, tmp_path / "out", jobs=2)
    whole, parallel = (snapshot(folder) for folder in (shards, tmp_path / "out"))
    for files in (whole, parallel):
        del files[".checked.json"]
    assert whole == parallel


@pytest.mark.slow
def test_killed_command_resumes_and_leaves_no_process(texts, shards, tmp_path):
    """SIGKILL to the main process, which cannot end its workers."""
    out = tmp_path / "out"
    words = ["tokenize", texts, "--out", out, "--jobs", 2, "--shard-bytes", 9_000]
    command = [*COMMAND, *map(str, words), "--validation-fraction", "0.3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    while not list(out.glob(".shard-*.json")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate()  # until every process that has the pipe has ended
    assert not (out / "manifest.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "keeping " in done.stdout
    whole, resumed = (snapshot(folder) for folder in (shards, out))
    for files in (whole, resumed):
        del files[".checked.json"], files[".plan.json"]  # the latter has the path of this test
    assert whole == resumed


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text(max_size=20), max_size=12), st.integers(1, 60))
def test_lines_are_read_once_for_any_split(tmp_path_factory, texts, size):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    content = "\n\n".join(json.dumps({"text": text}) for text in texts).encode()
    path.write_bytes(content)
    spans = [Span(str(path), i, min(i + size, len(content))) for i in range(0, len(content), size)]
    found = [document for span in spans for document in read_span(span, "text")]
    assert found == [text.encode("utf-8", "surrogatepass") for text in texts if text]
    compressed = path.with_name("a.jsonl.gz")
    compressed.write_bytes(gzip.compress(content))
    assert list(read_span(Span(str(compressed), 0, 1), "text")) == found


def test_incomplete_compressed_file_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n' * 9)[:-12])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: incomplete: restore the file"):
        write_shards(path, tmp_path / "out")


@pytest.mark.parametrize("line", ['{"body": "x"}', '{"text": 3}', '"text"', "{"])
def test_lines_without_text_are_refused(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "first"}}\n{line}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: the line at byte 18 must be a JSON object"):
        write_shards(path, tmp_path / "out")


def test_wrong_use_of_the_command(texts, shards, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for words, message in (
        ([texts], "Missing option '--out'"),
        (["nowhere", "--out", out], "nowhere: no such file or folder: correct CORPUS"),
        ([shards, "--out", out], "a folder of tokenized shards: CORPUS needs text"),
        ([texts, "--out", out, "--tokenizer", "x.json"], "x.json: No such file"),
        ([texts, "--out", texts], "not empty: delete it, or set another --out"),
        ([texts, "--out", shards], "shards of another corpus, tokenizer or options"),
    ):
        assert mc(monkeypatch, "tokenize", *words, "--jobs", 1) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert not out.exists()
    with full_disk(12_000):
        assert mc(monkeypatch, "tokenize", texts, "--out", out, "--jobs", 1) == 2
    err = capsys.readouterr().err
    assert "File too large" in err
    assert err.count("\n") == 1
    assert mc(monkeypatch, "tokenize", texts, "--out", out, "--jobs", 1) == 0
    assert "documents in 1 shard," in capsys.readouterr().out
