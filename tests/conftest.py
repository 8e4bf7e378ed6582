"""Settings of the whole test run; fixtures that hold our own code to stricter rules."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from helpers.tiny_run import without_pictures
from parity.environment import EXACT_ROUNDING, flags, quick_compile

# Almost all of the time goes into XLA's compiler, never into these tiny programs: without its
# optimisations a jitted gradient takes 1-2 s in place of 10.
os.environ["XLA_FLAGS"] = flags(
    EXACT_ROUNDING | quick_compile() | {"xla_cpu_parallel_codegen_split_count": 1}
)
# A program that several tests, workers or commands need is compiled once in a session: what this
# process starts, xdist's workers too, inherits its environment.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/programs-of-{os.getpid()}"
)
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**32)  # a limit makes JAX lock its files
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"
# matplotlib prints a warning, and searches the fonts in every process, if it cannot write to HOME.
if not os.access(os.path.expanduser("~"), os.W_OK):
    os.environ.setdefault("MPLCONFIGDIR", f"{os.environ['JAX_COMPILATION_CACHE_DIR']}/matplotlib")

import jax

jax.config.update("jax_num_cpu_devices", 8)


def pytest_unconfigure() -> None:
    """Remove this session's programs."""
    programs = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if programs.endswith(f"-{os.getpid()}"):
        shutil.rmtree(programs, ignore_errors=True)


_MAPS = Path("/proc/self/maps")
_tests = count(1)


def pytest_collection_finish() -> None:
    """Exclude modules and tests from garbage collection: they stay, and there are millions."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Drop compiled programs before they use up the process's memory maps (Linux: 65,530).

    Programs and traces that stay are excluded from garbage collection.
    """
    yield
    if next(_tests) % 16:
        return
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def float64() -> Iterator[None]:
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def strict() -> Iterator[None]:
    """Refuse implicit promotion of dtypes and ranks."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """The file of a tokenizer of three words."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "the", "memory", "reads"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    words.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files."""
    from helpers.shard_folders import write_texts

    return write_texts(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def shards(texts: Path) -> Path:
    """The folder of the shards of `texts`."""
    from helpers.shard_folders import write_shards

    folder = texts.parent / "shards"
    manifest, _ = write_shards(texts, folder)
    assert len(manifest.shards) > 3
    return folder
