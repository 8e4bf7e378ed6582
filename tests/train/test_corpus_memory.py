"""Memory of a run on shards does not grow with the corpus."""

import re
import subprocess
from pathlib import Path

import pytest

from helpers.shard_folders import write_shards, write_texts
from helpers.tiny_run import COMMAND, TINY, write_config
from train.shards.plan import ShardOptions

MIB = 2**20


def write_large(folder: Path, size: int) -> Path:
    """Write `size` bytes of repeated text, in files of 16 MiB that begin with their number."""
    folder.mkdir()
    text = (write_texts(folder.parent / "once", count=1) / "00.txt").read_bytes()
    repeated = text * (16 * MIB // len(text))
    for number in range(size // len(repeated)):
        (folder / f"{number:04d}.txt").write_bytes(b"%d\n" % number + repeated)
    return folder


def peak_memory(config: Path, *words: str) -> int:
    """Train in a process, and return its largest resident size in bytes.

    The `ru_maxrss` of a child also includes the size of the process that starts it.
    """
    report = "import atexit; atexit.register(lambda: print(open('/proc/self/status').read())); "
    python, option, code = COMMAND
    command = [python, option, report + code, "train", str(config), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """2 GB of text, of which every step reads other windows; 500 MB above a small corpus."""
    corpus = write_large(tmp_path / "large", 2000 * MIB)
    manifest, _ = write_shards(corpus, tmp_path / "shards", ShardOptions())
    assert manifest.tokens > 1800 * MIB
    run = TINY["run"] | {"steps": 300, "batch_size": 16, "directory": str(tmp_path / "run")}
    data = TINY["data"] | {"window": 64, "validation_fraction": 0.05}
    config = write_config(tmp_path, run=run, data=data | {"corpus": str(tmp_path / "text")})
    small = peak_memory(config, f"run.directory={tmp_path / 'small'}")
    large = peak_memory(config, f"data.corpus={tmp_path / 'shards'}")
    print(f"peak memory: {small / MIB:.0f} MiB with 16 KB of text, {large / MIB:.0f} with 2 GB")
    assert large - small < 500 * MIB
