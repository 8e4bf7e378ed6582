"""`mc harness`: lm-eval's task definitions on local files in the data sets' schemas."""

import json
import math
from pathlib import Path

import lm_eval.tasks
import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from helpers import tokenizer_files
from helpers.likelihoods import continue_greedily, likelihood
from helpers.tiny_run import fails, mc, untrained_run
from mc_core.errors import UserError
from train.checkpoint import load_run
from train.data.hf_tokenizer import byte_tokenizer
from train.harness.command import TASKS, HarnessOptions, check_tasks
from train.harness.model import MAX_NEW_TOKENS, HarnessModel

DEFINITIONS = Path(lm_eval.tasks.__file__).parent
PIQA = [
    {"goal": "to read", "sol1": "open it", "sol2": "eat it"},
    {"goal": "to eat", "sol1": "a cup", "sol2": "bread"},
    {"goal": "to sit", "sol1": "chairs", "sol2": "air"},
]
# Texts of similar lengths share compiled programs.
LAMBADA = [
    {"text": "the deep sea is cold and very blue"},
    {"text": "two and two are together more, four"},
]
WIKITEXT = [
    {"page": "a short page of some more words"},
    {"page": "another page that has other words"},
]
QUESTIONS = ["who was it", "where is it"]


def write_task(folder: Path, definition: str, rows: list[dict], split: str, **fields: object):
    """Write rows as JSON lines, and a task with lm-eval's own definition that reads them."""
    name = f"local_{Path(definition).stem}"
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "include": str(DEFINITIONS / definition),
        "task": name,
        "tag": [],
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data)}},
        "training_split": None,
        "validation_split": None,
        "test_split": None,
        **({"validation_split": split} if split == "validation" else {"test_split": split}),
        **fields,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a linear memory that has not trained."""
    words = ("model.mixers=[memory]", "model.layer.aggregation=none")
    return untrained_run(tmp_path_factory.mktemp("harness"), *words)


@pytest.fixture(scope="module")
def model(run):
    return load_run(run)[1]


@pytest.fixture(scope="module")
def results(run, model, tmp_path_factory):
    """Expected scores by hand, and the results of one command over four tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    expected = {}

    scores = [
        [likelihood(model, f"Question: {row['goal']}\nAnswer:".encode(), f" {row[key]}".encode())
         for key in ("sol1", "sol2")]
        for row in PIQA
    ]  # fmt: skip
    # The labels make the first two answers correct, and the third one wrong.
    best = [int(second[0] > first[0]) for first, second in scores]
    labels = [best[0], best[1], 1 - best[2]]
    normed = [
        int(second[0] / len(row["sol2"]) > first[0] / len(row["sol1"]))
        for row, (first, second) in zip(PIQA, scores, strict=True)
    ]
    same = [a == b for a, b in zip(normed, labels, strict=True)]
    expected["local_piqa"] = {"acc": 2 / 3, "acc_norm": sum(same) / 3}
    rows = [row | {"label": label} for row, label in zip(PIQA, labels, strict=True)]
    write_task(folder, "piqa/piqa.yaml", rows, "validation")

    words = [row["text"].rpartition(" ")[::2] for row in LAMBADA]
    scores = [likelihood(model, a.encode(), f" {b}".encode()) for a, b in words]
    expected["local_lambada_openai"] = {
        "perplexity": math.exp(-sum(total for total, _ in scores) / 2),
        "acc": sum(greedy for _, greedy in scores) / 2,
    }
    write_task(folder, "lambada/lambada_openai.yaml", LAMBADA, "test")

    # A page follows the separator of the run, a newline.
    totals = [likelihood(model, b"\n", row["page"].encode())[0] for row in WIKITEXT]
    size = sum(len(row["page"].encode()) for row in WIKITEXT)
    expected["local_wikitext"] = {"bits_per_byte": -sum(totals) / size / math.log(2)}
    write_task(folder, "wikitext/wikitext.yaml", WIKITEXT, "test")

    prompts = [f"Answer these questions:\n\nQ: {words}?\nA:" for words in QUESTIONS]
    texts = [bytes(continue_greedily(model, prompt.encode(), 6)) for prompt in prompts]
    # Not the character that stands for invalid bytes: they may become valid with the next one.
    stop = next(x for x in texts[0].decode(errors="replace")[1:] if x != "\ufffd")
    answers = [text.decode(errors="replace").partition(stop)[0] for text in texts]
    rows = [
        {"question": QUESTIONS[0], "answer": [answers[0]]},
        {"question": QUESTIONS[1], "answer": ["never that"]},
    ]
    expected["local_nq_open"] = {"exact_match": 0.5}
    options = {"until": [stop], "max_gen_toks": 6, "do_sample": False}
    write_task(
        folder, "nq_open/nq_open.yaml", rows, "validation",
        generation_kwargs=options, metric_list=[{"metric": "exact_match", "aggregation": "mean"}],
    )  # fmt: skip

    output, markdown = folder / "results.json", folder / "results.md"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        words = ["--tasks", ",".join(expected), "--include-path", folder, "--batch-size", 4]
        code = mc(patch, "harness", run, *words, "--output", output, "--markdown", markdown)
    assert code == 0
    return expected, json.loads(output.read_text()), markdown.read_text(), folder


def test_scores_equal_those_by_hand(results):
    expected, found, markdown, _ = results
    for task, metrics in expected.items():
        for metric, value in metrics.items():
            scores = found["results"][task]
            (actual,) = (x for key, x in scores.items() if key.startswith(f"{metric},"))
            assert actual == pytest.approx(value, rel=1e-4), (task, metric)
            assert f"| {task} | {metric}" in markdown
    assert found["n-samples"]["local_piqa"]["effective"] == 3
    assert found["config"]["batch_size"] == "4"
    assert "commit" in found["config"]["memory_caching"]["machine"]


def test_exported_model_has_the_same_scores(run, results, tmp_path, monkeypatch):
    """By lm-eval's own model for transformers; generation there needs an end-of-text token."""
    expected, found, _, folder = results
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    assert mc(monkeypatch, "export", run, tmp_path / "folder") == 0
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    arguments = f"pretrained={tmp_path / 'folder'},dtype=float32,prefix_token_id=10"
    exported = simple_evaluate(
        "hf", arguments, list(expected), batch_size=2, device="cpu", task_manager=tasks,
        bootstrap_iters=0, log_samples=False,
    )["results"]  # fmt: skip
    for task in expected:
        for key, value in found["results"][task].items():
            if isinstance(value, float) and "stderr" not in key:
                assert exported[task][key] == pytest.approx(value, rel=1e-4), (task, key)


@pytest.mark.slow
def test_limit_length_and_overrides_are_applied(run, results, monkeypatch, capsys):
    """One text, truncated to 12 tokens in the middle, by the model with a cache."""
    folder, output = results[3], results[3] / "limited.json"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    override = "model.layer.aggregation=mean"
    words = [override, "--tasks", "local_lambada_openai", "--include-path", folder]
    words += ["--limit", 1, "--max-length", 12, "--output", output]
    assert mc(monkeypatch, "harness", run, *words) == 0
    found = json.loads(output.read_text())
    assert found["config"]["memory_caching"]["overrides"] == [override]
    context = b"the deep sea is cold and very"
    changed = load_run(run, overrides=[override])[1]
    # " blue" has 5 tokens, so 7 of the context remain.
    total, _ = likelihood(changed, context[:3] + context[-4:], b" blue")
    scores = found["results"]["local_lambada_openai"]
    assert scores["perplexity,none"] == pytest.approx(math.exp(-total), rel=1e-4)
    assert f"run {override}: lm-eval" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using slow pure-python")  # of LongBench's metrics
def test_needles_are_generated_with_the_tokenizer_of_the_model(run, tmp_path, monkeypatch):
    """RULER sizes its texts with the model's tokenizer; LongBench scores generated answers."""
    task = {
        "include": str(DEFINITIONS / "ruler" / "niah_single_1.yaml"),
        "task": "local_needles",
        "tag": [],
        "metadata": {"version": 1.0, "max_seq_lengths": [700]},
        "metric_list": [{"metric": "700", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": ["never"], "max_gen_toks": 4},
    }
    (tmp_path / "needles.yaml").write_text(yaml.safe_dump(task))
    rows = [{"context": "a b c", "question": "which letters", "answers": ["x y z"]}]
    write_task(
        tmp_path, "longbench/hotpotqa.yaml", rows, "test",
        generation_kwargs={"until": [], "max_gen_toks": 4},
    )  # fmt: skip
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lengths, output = [], tmp_path / "out.json"
    truncate = HarnessModel._truncate
    monkeypatch.setattr(
        HarnessModel,
        "_truncate",
        lambda self, ids, new: lengths.append(len(ids)) or truncate(self, ids, new),
    )
    words = ["--tasks", "local_needles,local_hotpotqa", "--include-path", tmp_path]
    assert mc(monkeypatch, "harness", run, *words, "--limit", 3, "--output", output) == 0
    found = json.loads(output.read_text())["results"]
    # An untrained model finds nothing.
    assert found["local_needles"]["700,none"] == 0
    assert found["local_hotpotqa"]["qa_f1_score,none"] == 0
    assert len(lengths) == 4
    assert all(400 < length <= 700 for length in lengths[:3])


def test_generation_options_and_end_of_text_are_those_of_the_task_and_the_tokenizer():
    tokenizer = tokenizer_files.words("<|endoftext|>", "the", "sea")
    model = HarnessModel(None, tokenizer)
    assert model.eot_token_id == model.prefix_token_id == tokenizer.token_to_id("<|endoftext|>")
    assert model.tok_encode("the sea") == [tokenizer.token_to_id(x) for x in ("the", "sea")]
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 3}
    options = model._options({"until": "x", **sampled})
    assert (options.temperature, options.top_p, options.max_tokens) == (0.7, 0.9, 3)
    assert options.stops == ("x", "<|endoftext|>")
    greedy = model._options({"until": ["x", "y"], "do_sample": False, "temperature": 1.0})
    assert (greedy.temperature, greedy.max_tokens) == (0.0, MAX_NEW_TOKENS)
    with pytest.raises(UserError, match="generation_kwargs: num_beams: not supported"):
        model._options({"num_beams": 2})
    model = HarnessModel(None, tokenizer_files.words("the"))
    with pytest.raises(UserError, match="the tokenizer has no token for the separator of the run"):
        _ = model.prefix_token_id


def test_byte_tokenizer_of_tasks_encodes_bytes():
    tokenizer, text = byte_tokenizer(), "a é\n\x00 漢"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert [tokenizer.encode(chr(i)).ids for i in range(128)] == [[i] for i in range(128)]


def test_groups_name_only_tasks_of_lm_eval():
    """The paper's lists; every task is defined in a file of lm-eval."""
    known = set()
    for file in DEFINITIONS.rglob("*.yaml"):
        known.update(
            line.partition(":")[2].strip()
            for line in file.read_text().splitlines()
            if line.startswith("task: ")
        )
    sizes = {}
    for file in TASKS.glob("*.yaml"):
        group = yaml.safe_load(file.read_text())
        names = [x if isinstance(x, str) else x["task"] for x in group["task"]]
        sizes[group["group"]] = len(names)
        assert file.stem == group["group"]
        assert known.issuperset(names), set(names) - known
    assert sizes == {"mc-commonsense": 9, "mc-recall": 6, "mc-longbench": 14, "mc-ruler": 3}


def test_unreachable_data_sets_name_the_folder_to_fill(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", tmp_path / "hub")
    task = {"include": str(DEFINITIONS / "piqa" / "piqa.yaml"), "task": "remote_piqa"}
    (tmp_path / "remote.yaml").write_text(yaml.safe_dump(task))
    words = ["harness", run, "--tasks", "remote_piqa", "--include-path", tmp_path]
    assert mc(monkeypatch, *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mc: a data set cannot be loaded: Couldn't reach 'baber/piqa'")
    assert f"copy the folder {tmp_path / 'hub'} from a machine that has" in error


def test_unknown_tasks_list_the_nearest():
    with pytest.raises(ValueError, match=r"--tasks piqq: no such task .*; nearest names: piqa"):
        check_tasks(["piqq"], ["piqa", "boolq"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", ","], "--tasks: give at least one task"),
        (["--limit", "1.5"], "--limit = 1.5: must be a share below 1 or a whole number"),
        (["--batch-size", "0"], "--batch-size = 0: must be auto or >= 1"),
        (["--batch-size", "many"], "--batch-size = many: must be auto or >= 1"),
        (["--max-length", "1"], "--max-length = 1: must be >= 2"),
        (["--num-fewshot", "-1"], "--num-fewshot = -1: must be >= 0"),
        (["--include-path", "nowhere"], "--include-path nowhere: no such folder"),
    ],
)
def test_invalid_harness_options_are_refused(run, monkeypatch, capsys, words, message):
    words = words if "--tasks" in words else ["--tasks", "piqa", *words]
    fails(run.parent / "tiny.yaml", monkeypatch, capsys, message, "harness", run, *words)


def test_default_options_are_valid():
    assert HarnessOptions(("piqa",)).rows is None
    assert HarnessOptions(("piqa",), limit=0.5, batch_size="8").rows == 8
