"""`mc tokenize`: write a corpus as shards of tokens, with several processes."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing.synchronize import Event
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mc_core.errors import UserError
from mc_core.files import to_json, write_atomic
from mc_core.tables import counted
from train.data.documents import FORMAT, MANIFEST, SHARD_SUFFIX
from train.data.separator import choose_separator
from train.data.tokenizer import load_tokenizer, read_tokenizer
from train.data.tokenizer_copy import FILE as TOKENIZER
from train.data.tokenizer_copy import hash_of
from train.interrupt import on_interrupt
from train.lock import Lock
from train.shards.manifest import Manifest, load_manifest, save_manifest
from train.shards.plan import Plan, ShardOptions, make_plan
from train.shards.writer import (
    ANY_SIZE,
    ShardJob,
    WrittenShard,
    load_record,
    merge_documents,
    record_path,
    vocab_size_of,
    write_shard,
)

PLAN = ".plan.json"  # hash of what the shards of a folder depend on
HELD_OUT = f"held-out{SHARD_SUFFIX}"


def tokenize(
    corpus: Sequence[str], folder: Path, options: ShardOptions, jobs: int, console: Console
) -> Manifest:
    """Write the shards of a corpus and their manifest; finished shards are kept.

    Args:
        corpus: files, folders, or the words `stdlib` and `site-packages`.
        folder: output folder.
        options: what the shards depend on.
        jobs: number of processes.
        console: receives progress and a summary.

    Raises:
        UserError: the corpus or the tokenizer cannot be used, the folder has shards of another
            corpus, tokenizer or options, or another process writes it.
        OSError: a file cannot be read or written.
        KeyboardInterrupt: the same command resumes.
    """
    start = time.monotonic()
    tokenizer = load_tokenizer(options.tokenizer, ANY_SIZE)
    choose_separator(options.separator, tokenizer)
    plan = make_plan(corpus, options, hash_of(options.tokenizer) or "bytes")
    with (
        closing(Lock(folder / ".lock", folder, "wait for it, or set another --out")) as lock,
        on_interrupt(lambda: f"interrupted: the same command resumes {folder}"),
    ):
        lock.acquire()
        folder.mkdir(parents=True, exist_ok=True)
        _check_same_plan(folder, plan)
        if (folder / MANIFEST).is_file():
            manifest = load_manifest(folder)
            console.print(f"{folder}: already complete", soft_wrap=True, highlight=False)
            return manifest
        if (content := read_tokenizer(options.tokenizer)) is not None:
            write_atomic(folder / TOKENIZER, content)
        written = _write_all(folder, plan, options, min(jobs, len(plan.shards)), console)
        manifest = _finish(folder, options, vocab_size_of(tokenizer), written)
    for line in _summary(folder, manifest, time.monotonic() - start):
        console.print(line, soft_wrap=True, highlight=False)
    return manifest


def _check_same_plan(folder: Path, plan: Plan) -> None:
    """Record the plan of a new folder, or check that an existing folder has the same."""
    path = folder / PLAN
    if path.is_file():
        if json.loads(path.read_text()).get("sha256") != plan.digest:
            raise UserError(
                f"{folder}: has shards of another corpus, tokenizer or options: delete it, or set "
                "another --out"
            )
    elif any(file.name != ".lock" for file in folder.iterdir()):
        raise UserError(f"{folder}: not empty: delete it, or set another --out")
    else:
        write_atomic(path, to_json({"sha256": plan.digest}).encode())


def _write_all(
    folder: Path, plan: Plan, options: ShardOptions, jobs: int, console: Console
) -> list[WrittenShard]:
    """Write all shards that are not finished, and return all in order."""
    done = {
        number: found
        for number in range(len(plan.shards))
        if (found := load_record(folder, number)) is not None
    }
    if done:
        line = f"{folder}: keeping {len(done)} of {len(plan.shards)} shards"
        console.print(line, soft_wrap=True, highlight=False)
    work = [
        ShardJob(number, spans, folder, options)
        for number, spans in enumerate(plan.shards)
        if number not in done
    ]
    bar = Progress(
        TextColumn("{task.fields[shards]} shards"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    sizes = plan.sizes
    with bar:
        task = bar.add_task("", total=sum(sizes), shards=len(done))
        bar.update(task, completed=sum(sizes[number] for number in done))
        for number, found in _run(work, jobs, folder):
            done[number] = found
            bar.update(task, advance=sizes[number], shards=len(done))
    return [done[number] for number in range(len(plan.shards))]


def _run(work: list[ShardJob], jobs: int, folder: Path) -> Iterator[tuple[int, WrittenShard]]:
    """Yield the number of each shard and its files, in the order in which they are finished."""
    if jobs == 1:
        yield from ((job.number, write_shard(job)) for job in work)
        return
    # Forked processes would inherit the threads of XLA.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(stop,))
    try:
        futures = {pool.submit(write_shard, job): job.number for job in work}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"{folder}: a process was killed, possibly for lack of memory: run the same command "
            "with fewer --jobs; it keeps finished shards"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _start_worker(stop: Event) -> None:
    """Leave interrupts to the main process; end at `stop`, and with the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        while not stop.wait(0.5) and parent.is_alive():
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _finish(
    folder: Path, options: ShardOptions, vocab_size: int, written: list[WrittenShard]
) -> Manifest:
    """Merge the held-out documents, write the manifest, and delete what is no longer needed."""
    parts = [folder / found.held_out.name for found in written if found.held_out]
    shards = tuple(found.train for found in written if found.train)
    if not shards:
        raise UserError(
            f"{folder}: every document is held out: set a smaller --validation-fraction"
        )
    manifest = Manifest(
        format=FORMAT,
        tokenizer=hash_of(options.tokenizer) or "bytes",
        vocab_size=vocab_size,
        separator=options.separator,
        validation_fraction=options.validation_fraction,
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
        documents=sum(shard.documents for shard in shards),
        shards=shards,
        held_out=merge_documents(parts, folder / HELD_OUT) if parts else None,
    )
    save_manifest(folder, manifest)
    for path in (*parts, *(record_path(folder, number) for number in range(len(written)))):
        path.unlink(missing_ok=True)
    return manifest


def _summary(folder: Path, manifest: Manifest, seconds: float) -> list[str]:
    held_out = manifest.held_out
    lines = [
        f"{folder}: {counted(manifest.tokens, 'token')} of "
        f"{counted(manifest.documents, 'document')} in {counted(len(manifest.shards), 'shard')}, "
        f"{manifest.text_bytes / manifest.tokens:.3f} bytes per token; "
        f"held out: {counted(held_out.documents if held_out else 0, 'document')}; {seconds:.0f} s"
    ]
    if held_out is None:
        lines.append("no document is held out: set data.validation in runs on this folder")
    return lines
