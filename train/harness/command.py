"""`mc harness`: run tasks of lm-eval on a run, and write its results and a table."""

import difflib
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from mc_core.errors import NotFiniteError, UserError
from mc_core.files import to_bytes, to_json, write_atomic
from mc_core.tables import ResultTable, Row
from parity.environment import command, result_table
from train.checkpoint import run_separator
from train.evaluation.generate import load_source
from train.harness.tokenizer_folder import write_tokenizer

TASKS = Path(__file__).parent / "tasks"  # the paper's lists
HUB = "https://huggingface.co"
TIMEOUT = 3.0  # seconds until the hub counts as unreachable
BOOTSTRAP = 1000  # resamples for standard errors that have no formula
PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@dataclass(frozen=True)
class HarnessOptions:
    """Options of `mc harness`.

    Attributes:
        tasks: names of tasks, groups or tags, or paths of YAML files.
        limit: examples per task, or below 1 their share; None = all.
        num_fewshot: examples in the context; None = that of each task.
        include: folders with further task files.
        batch_size: `auto`, or the number of sequences per batch.
        max_length: see `HarnessModel`.
        tokenizer: as in `load_source`.

    Raises:
        UserError: a value is not allowed.
    """

    tasks: tuple[str, ...]
    limit: float | None = None
    num_fewshot: int | None = None
    include: tuple[Path, ...] = ()
    batch_size: str = "auto"
    max_length: int | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError("--tasks: give at least one task")
        if self.limit is not None and not (
            0 < self.limit < 1 or (self.limit >= 1 and self.limit == int(self.limit))
        ):
            raise UserError(f"--limit = {self.limit:g}: must be a share below 1 or a whole number")
        for name, low in (("num_fewshot", 0), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"--{name.replace('_', '-')} = {value}: must be >= {low}")
        if self.rows is not None and self.rows < 1:
            raise UserError(f"--batch-size = {self.batch_size}: must be auto or >= 1")
        for folder in self.include:
            if not folder.is_dir():
                raise UserError(f"--include-path {folder}: no such folder")

    @property
    def rows(self) -> int | None:
        """Sequences per batch; None = by length."""
        if self.batch_size == "auto":
            return None
        return int(self.batch_size) if self.batch_size.isdecimal() else 0


def harness(
    source: Path,
    options: HarnessOptions,
    console: Console,
    *,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    markdown: Path | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-eval, and print and write the results.

    Args:
        source: run directory or `.safetensors` file; see `load_source`.
        options: tasks and their settings.
        console: receives the table.
        overrides: changes of the model; see `load_source`.
        output: output file of lm-eval's results, as JSON.
        markdown: output file of the table.

    Returns:
        lm-eval's results.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, its data set cannot be reached, or
            the model does not support it.
        OSError: a file cannot be read or written.
        NotFiniteError: the model's logits are not finite.
    """
    if find_spec("lm_eval") is None:
        raise UserError("mc harness needs lm-eval: pip install 'memory-caching-jax[eval]'")
    model, words = load_source(source, options.tokenizer, overrides)
    _go_offline_if_unreachable()
    from lm_eval import simple_evaluate

    from train.harness.model import HarnessModel

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    info = {
        "memory_caching": {
            "run": str(source),
            "overrides": list(overrides),
            "model": model.config.name,
            "max_length": options.max_length,
            "command": command(),
        }
    }
    with tempfile.TemporaryDirectory() as folder, _single_process():
        tokenizer = write_tokenizer(Path(folder), words)
        manager = _make_manager(options, {"tokenizer": str(tokenizer)})
        check_tasks(options.tasks, manager.all_tasks)
        harness_model = HarnessModel(
            model,
            words,
            separator=run_separator(source) if source.is_dir() else None,
            batch_size=options.rows,
            max_length=options.max_length,
            info=info,
        )
        limit = options.limit if options.limit is None or options.limit < 1 else int(options.limit)
        with _hub_errors():
            results = simple_evaluate(
                harness_model,
                tasks=list(options.tasks),
                num_fewshot=options.num_fewshot,
                batch_size=options.batch_size,
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
                task_manager=manager,
            )
    table = make_table(results, " ".join((source.resolve().name, *overrides)))
    results["config"]["memory_caching"] |= {"machine": table.machine}
    console.print(table.table())
    for line in table.footer():
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if output:
        write_atomic(output, to_json(_plain(results), indent=1).encode())
    if markdown:
        write_atomic(markdown, to_bytes(table.as_markdown()))
    return results


def _make_manager(options: HarnessOptions, metadata: dict[str, Any]) -> Any:
    """Return the index of tasks; lm-eval's own tasks, which take long, only if they are needed."""
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=list(options.include), include_defaults=False, metadata=metadata)
    if all(task in own.all_subtasks for task in options.tasks):
        return own
    return TaskManager(include_path=[TASKS, *options.include], metadata=metadata)


def check_tasks(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Check that tasks exist.

    Raises:
        UserError: a name is neither known nor a file; the message has the nearest names.
    """
    for task in tasks:
        if task not in known and not Path(task).is_file():
            near = difflib.get_close_matches(task, known, n=3)
            nearest = f"; nearest names: {', '.join(near)}" if near else ""
            raise UserError(
                f"--tasks {task}: no such task of lm-eval or of a folder of --include-path{nearest}"
            )


def make_table(results: dict[str, Any], name: str) -> ResultTable:
    """Return one row per task and metric of lm-eval's results."""
    rows: list[Row] = []
    for task, scores in (results.get("groups", {}) | results["results"]).items():
        sizes = results.get("n-samples", {}).get(task, {})
        for key, value in scores.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = scores.get(f"{metric}_stderr,{filtered}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if filtered == "none" else f"{metric} ({filtered})",
                    "value": f"{value:.4f}",
                    "stderr": f"{error:.4f}" if isinstance(error, int | float) else None,
                    "examples": sizes.get("effective"),
                    "few-shot": results.get("n-shot", {}).get(task),
                }
            )
    notes = [f"scores of lm-eval {results.get('lm_eval_version', '')}".rstrip()]
    return result_table(f"{name}: lm-eval", rows, notes)


def _plain(results: dict[str, Any]) -> Any:
    """Return results as plain JSON values, in the way of lm-eval's own files."""
    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(results, default=handle_non_serializable, ensure_ascii=False))


@contextmanager
def _single_process() -> Iterator[None]:
    """Compute standard errors in this process: JAX does not support forked ones."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextmanager
def _hub_errors() -> Iterator[None]:
    """Turn failed downloads into a message that names the folder to fill."""
    try:
        yield
    except (UserError, NotFiniteError):
        raise
    except Exception as error:
        if not _is_connection_error(error):
            raise
        from datasets import config

        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"a data set cannot be loaded: {reason}: run the command once with access to "
            f"{_endpoint()}, or copy the folder {config.HF_CACHE_HOME} from a machine that has; "
            "HF_HOME sets another folder"
        ) from error


def _is_connection_error(error: BaseException | None) -> bool:
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & {"ConnectionError", "ConnectError", "DatasetNotFoundError", "gaierror"}:
            return True
        error = error.__cause__ or error.__context__
    return False


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", HUB)


def _go_offline_if_unreachable() -> None:
    """Use only local data sets if the hub does not answer, instead of retrying for minutes."""
    if any(os.environ.get(name) for name in PROXIES):
        return
    parts = urlsplit(_endpoint())
    try:
        address = (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443))
        socket.create_connection(address, timeout=TIMEOUT).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import datasets
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
