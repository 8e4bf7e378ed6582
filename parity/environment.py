"""Environment of a run: compiler flags, installed frameworks, machine and command.

Functions import jax and torch lazily, because flags must be set before.
"""

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mc_core.installation import source_commit
from mc_core.tables import ResultTable, Row

PACKAGES = ("jax", "flax", "torch", "memory-caching", "titans-pytorch", "flash-linear-attention")
SETTINGS = ("GLIBC_TUNABLES", "NPROC", "OMP_NUM_THREADS")
FUSION_EMITTERS_UNTIL = (0, 11)  # from this jax version on, the flag may not exist


# Round to bfloat16 between fused operations, which XLA otherwise omits.
EXACT_ROUNDING: dict[str, bool | int] = {"xla_allow_excess_precision": False}


def quick_compile() -> dict[str, bool | int]:
    """Return XLA options that compile tiny programs about five times faster.

    They disable optimisations. XLA aborts at unknown options, so they depend on the jax version.
    """
    options: dict[str, bool | int] = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    if find_spec("jax") and _release(version("jax")) < FUSION_EMITTERS_UNTIL:
        options["xla_cpu_use_fusion_emitters"] = False
    return options


def flags(options: dict[str, bool | int]) -> str:
    """Return options as XLA_FLAGS; the flags of the user come last and take precedence."""
    words = [f"--{name}={str(value).lower()}" for name, value in options.items()]
    return " ".join((*words, os.environ.get("XLA_FLAGS", "")))


def _release(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:2]))


EXTRAS = {
    "jax": "jax",
    "flax": "jax",
    "torch": "torch",
    "optax": "train",
    "omegaconf": "train",
    "rich": "train",
}


class MissingError(RuntimeError):
    """A required package or device is missing."""


def prepare(device: str, packages: tuple[str, ...] = ("jax", "flax", "torch")) -> None:
    """Prepare both frameworks for a comparison on a device, `cpu` or `cuda`.

    Raises:
        MissingError: a package is not installed, or a framework has no access to the device.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingError(
                f"{package} is not installed: pip install 'memory-caching-jax[{EXTRAS[package]}]'"
            )
    if "jax" not in sys.modules:
        options = EXACT_ROUNDING
        if device == "cpu":
            # One program is compiled in a thread while another is traced.
            options = options | quick_compile() | {"xla_cpu_parallel_codegen_split_count": 1}
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ["XLA_FLAGS"] = flags(options)
    import jax
    import torch

    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise MissingError("torch finds no CUDA device: install its CUDA build, or --device cpu")
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        raise MissingError(
            "jax finds no CUDA device: pip install 'memory-caching-jax[cuda]', or --device cpu"
        ) from error
    # Disable TF32, to which both frameworks round the operands of float32 products.
    jax.config.update("jax_default_matmul_precision", "highest")
    torch.set_float32_matmul_precision("highest")


def result_table(title: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> ResultTable:
    """Return a table with notes on this machine and the command."""
    return ResultTable(title, rows, notes, machine(), command())


def machine() -> dict[str, Any]:
    """Return the processor, its cores and load, the installed versions, and the commit."""
    import jax

    device = jax.devices()[0]
    found: dict[str, Any] = {
        "cores": len(cores()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "device": "CPU" if device.platform == "cpu" else device.device_kind,
        "processor": _processor(),
        "Python": platform.python_version(),
        "commit": source_commit(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cores() -> list[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def command() -> str:
    """Return the command line, with environment variables that affect its speed."""
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return shlex.join([*settings, "mc", *sys.argv[1:]])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
