"""Export of runs to folders of Hugging Face transformers, verified before they appear."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mc_core.errors import UserError
from mc_core.files import write_atomic
from parity import convert as between
from parity.carried_code import PACKAGES, add_code
from parity.files import ModuleWeights
from parity.hf import hf_format, import_hf
from parity.weights import jax_weights
from train.checkpoint import load_run
from train.config import TrainConfig
from train.config.recall_schema import MQARConfig
from train.convert import run_format
from train.data.hf_tokenizer import TokenizerFiles, tokenizer_files
from train.data.tokenizer_copy import hash_of
from train.evaluation.run_report import FILE as REPORT

CARD = "README.md"
PAPER = "[arXiv:2602.24281](https://arxiv.org/abs/2602.24281)"
# Figures of a run's report in the model card: key, unit, format.
FIGURES = (
    ("bits_per_byte", "bits per byte on the validation text", ".3f"),
    ("validation_bytes", "bytes of validation text", ",d"),
    ("parameters", "parameters", ",d"),
    ("steps", "optimizer steps", ",d"),
    ("tokens", "training tokens, including repetitions", ",d"),
    ("seconds", "seconds of training", ",.0f"),
)


def export(
    run: Path,
    folder: Path,
    *,
    with_code: bool,
    console: Console,
    overrides: Sequence[str] = (),
) -> between.Proof:
    """Write the last checkpoint of a run as a folder of Hugging Face transformers.

    The folder is written under a temporary name and loaded with transformers. It gets its name only
    if its parameters are bit-equal to those of the run, and its logits on a fixed batch are those
    of the run in JAX.

    Args:
        run: run directory.
        folder: folder to write; must not exist.
        with_code: add the code of the model, for `trust_remote_code=True`.
        console: receives the result.
        overrides: `key=value` changes of the configuration that need no new parameter; see
            `train.config.overrides`.

    Raises:
        UserError: transformers is not installed, the run, a path or an override cannot be used, or
            the verification fails. Nothing is written in these cases.
        OSError: a file cannot be read or written.
    """
    import_hf()
    config, model, step, _ = load_run(run, overrides=overrides)
    if with_code:
        _check_carried(config)
    tokenizer, files = None, TokenizerFiles({})
    if not isinstance(config.data, MQARConfig):
        tokenizer = hash_of(config.tokenizer) or "bytes"
        separator = getattr(config.data, "separator", None)
        files = tokenizer_files(config.tokenizer, config.model.vocab_size, separator)
    card = model_card(run, config, step, with_code=with_code, files=files, overrides=overrides)

    def add_files(path: Path) -> None:
        for name, content in (*files.files.items(), (CARD, card.encode())):
            write_atomic(path / name, content)
        if with_code:
            add_code(path)

    weights = ModuleWeights(config.model, jax_weights(model), "jax")
    read = run_format(None)._replace(read=lambda path: weights)
    write = hf_format(tokenizer=tokenizer, padding=files.padding, add_files=add_files)
    try:
        proof = between.convert(run, folder, read, write)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    console.print(
        f"{run} (step {step:,}) -> {folder}: {proof.parameters} parameters of {proof.dtype}, "
        f"bit-equal; logits of JAX and of the loaded folder in float64 differ by "
        f"{proof.distance:.1e} (relative RMS)",
        soft_wrap=True,
        highlight=False,
    )
    return proof


def model_card(
    run: Path,
    config: TrainConfig,
    step: int,
    *,
    with_code: bool,
    files: TokenizerFiles,
    overrides: Sequence[str] = (),
) -> str:
    """Return the model card: figures of the run, how to load the model, and its configuration.

    Args:
        run: run directory; its report has the figures, if the run is finished.
        config: configuration of the run.
        step: step of the checkpoint.
        with_code: the folder has the code of the model.
        files: files of the tokenizer, if the folder has one.
        overrides: changes of the configuration since training, to which the figures do not apply.
    """
    figures = _figures(run) or {"steps": step}
    rows = [f"| {name} | {figures[key]:{form}} |" for key, name, form in FIGURES if key in figures]
    rows += [f"| {name} | {value:.4g} |" for name, value in _scores(figures)]
    lines = [
        "---",
        "library_name: transformers",
        *(["pipeline_tag: text-generation"] if files.files else []),
        "tags: [memory-caching]",
        "---",
        "",
        f"# {run.resolve().name}",
        "",
        f"Language model with Memory Caching ({PAPER}): {config.model.num_layers} blocks of "
        f"{config.model.name}, trained on `data.task = {config.data.task}`.",
        "",
        *(
            [f"Changed after training, unlike in the figures: `{' '.join(overrides)}`.", ""]
            if overrides
            else []
        ),
        "| figure | value |",
        "|---|---|",
        *rows,
        "",
        *_usage(with_code, files),
        "",
        "The configuration of the model:",
        "",
        "```json",
        json.dumps(config.model.to_dict(), indent=2),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _usage(with_code: bool, files: TokenizerFiles) -> list[str]:
    """Return how to load the model, and with its code how to run tasks of lm-eval on it."""
    code = ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    loading = "AutoModelForCausalLM.from_pretrained(folder)"
    if with_code:
        loading = "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"
    else:
        code.insert(1, "import mc_torch.hf  # pip install 'memory-caching-jax[hf]'")
    code.append(f"model = {loading}")
    if files.files:
        code += [
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            'inputs = tokenizer("The", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        ]
    code.append("```")
    if files.files and with_code:
        arguments = "pretrained=FOLDER,trust_remote_code=True,dtype=float32"
        if files.prefix is not None:
            arguments += f",prefix_token_id={files.prefix}"
        code += ["", "Tasks of lm-eval, as by `mc harness`:", "", "```sh"]
        code += [f"lm_eval run --model hf --model_args {arguments} --tasks lambada_openai", "```"]
    return code


def _figures(run: Path) -> dict[str, Any] | None:
    """Return the report of a finished run."""
    try:
        report = json.loads((run / REPORT).read_text())
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def _scores(figures: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the scores of a run on a recall task."""
    score = figures.get("score")
    if not isinstance(score, dict):
        return []
    return [(name, value) for name, value in score.items() if isinstance(value, int | float)]


def _check_carried(config: TrainConfig) -> None:
    memory = type(config.model.layer.memory)
    if memory.__module__.partition(".")[0] not in PACKAGES:
        raise UserError(
            f"--with-code: model.layer.memory.kind = {config.model.layer.memory.kind!r} is defined "
            f"in {memory.__module__}: only memories of {' and '.join(PACKAGES)} can be carried"
        )
