"""What must be settled before jax and torch are imported: compiler flags, and that both exist."""

import os
import sys
from importlib.util import find_spec

# XLA's compiler takes nearly all of the time of a check, the tiny programs none. Without its
# optimisations it is about five times faster, and each program is compiled in one thread, while
# another is traced.
CPU_FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
EXTRAS = {
    "jax": "jax",
    "flax": "jax",
    "torch": "torch",
    "optax": "train",
    "omegaconf": "train",
    "rich": "train",
}


class MissingError(RuntimeError):
    """Something that the check needs is not there."""


def prepare(device: str, packages: tuple[str, ...] = ("jax", "flax", "torch")) -> None:
    """Make both frameworks ready for a comparison on a device, `cpu` or `cuda`.

    Raises:
        MissingError: a package is not installed, or a framework does not see the device.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingError(
                f"{package} is not installed: pip install 'memory-caching-jax[{EXTRAS[package]}]'"
            )
    if "jax" not in sys.modules and device == "cpu":
        # A user's own flags come last: they win.
        os.environ["XLA_FLAGS"] = " ".join((*CPU_FLAGS, os.environ.get("XLA_FLAGS", "")))
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import torch

    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise MissingError("torch sees no CUDA device: install its CUDA build, or --device cpu")
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        raise MissingError(
            "jax sees no CUDA device: pip install 'memory-caching-jax[cuda]', or --device cpu"
        ) from error
    # Both would round the factors of float32 products to TF32.
    jax.config.update("jax_default_matmul_precision", "highest")
    torch.set_float32_matmul_precision("highest")
