"""Verified conversion of weight files."""

import dataclasses
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import mc_jax
import mc_torch
from mc_core.config import MCConfig, ModelConfig
from mc_core.pretrained import Config, one_dtype
from mc_core.weights import ArraySpec, Flat, check_leaves, leaves
from parity.environment import quick_compile
from parity.files import Format, ModuleWeights
from parity.weights import jax_weights, load_jax, load_torch, torch_weights

TOLERANCE = 1e-9  # relative RMS, float64
BATCH, TOKENS, SEGMENT, CHUNK = 2, 45, 16, 8


class Proof(NamedTuple):
    """Result of verifying a conversion."""

    parameters: int  # number of arrays, all bit-equal
    dtype: str
    distance: float  # relative RMS difference of the float64 outputs of the two frameworks


def convert(
    source: Path,
    target: Path,
    read: Format,
    write: Format,
    config: Config | None = None,
) -> Proof:
    """Convert a weight file, and verify the result.

    The target is written to a temporary path and read back. Its parameters must be bit-equal to
    those of the source. One framework computes with the source's parameters, the other with the
    target's. The temporary path is renamed to the target only if the float64 outputs agree.

    Args:
        source: file or folder in the format `read`.
        target: path to write; must not exist.
        read: format of the source.
        write: format of the target.
        config: configuration of a source without one; otherwise, both must be equal.

    Raises:
        ValueError: source or target is invalid, or the verification fails; the message lists all
            parameters that differ.
        OSError: a file cannot be read or written.
    """
    if os.path.lexists(target):
        raise ValueError(f"{target}: exists; move it, or use another target")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such folder; create it, or use another target")
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if read.name == write.name:
        raise ValueError(f"{source}: already has the format {read.name}; copy it")
    given = read.read(source)
    config = _checked_config(source, given.config, config)
    try:
        dtype = one_dtype(leaves(given.flat))
        expected = outputs(config, given, given.framework)
        flat = given.in_layout(write.framework)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write.write(temporary, config, flat)
        written = write.read(temporary)
        _check_equal(target, given, written, config)
        if write.outputs is not None:
            short = shortened(config)
            actual = write.outputs(temporary, short, fixed_batch(short))
        else:
            other = "torch" if given.framework == "jax" else "jax"
            actual = outputs(config, written, other)
        distance = relative_rms(actual, expected)
        if not distance < TOLERANCE:
            raise ValueError(
                f"{target}: not written: the outputs of JAX and PyTorch differ by {distance:.1e} "
                f"(relative RMS, float64), allowed is {TOLERANCE:.0e}"
            )
        temporary.rename(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    return Proof(len(given.flat), dtype, distance)


def outputs(config: Config, weights: ModuleWeights, framework: str) -> np.ndarray:
    """Return the outputs of a module on a fixed batch, computed in float64 on the CPU.

    Args:
        config: configuration of a layer or a language model.
        weights: parameters, in either layout and any dtype.
        framework: "jax" or "torch".

    Returns:
        [b, t, d] of a layer, [b, t, vocab_size] of a language model.

    Raises:
        ValueError: parameters do not match the configuration; lists all of them.
    """
    config = shortened(config)
    run = _jax_outputs if framework == "jax" else _torch_outputs
    return run(config, weights.in_layout(framework), fixed_batch(config))


def relative_rms(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the RMS of the difference over that of `expected`."""
    scale = max(np.mean(expected**2), np.finfo(np.float64).tiny)
    return float(np.sqrt(np.mean((actual - expected) ** 2) / scale))


def shortened(config: Config) -> Config:
    """Return the configuration with segments and chunks much shorter than the fixed batch.

    This ensures that every parameter affects the outputs.
    """
    if isinstance(config, ModelConfig):
        layer = shortened(config.layer)
        assert isinstance(layer, MCConfig)
        return dataclasses.replace(config, layer=layer, remat="none")
    limits = {"segment_size": SEGMENT, "chunk_size": CHUNK}
    lengths: dict[str, Any] = {
        name: min(getattr(config, name), limit)
        for name, limit in limits.items()
        if hasattr(config, name)
    }
    return dataclasses.replace(config, **lengths)


def fixed_batch(config: Config) -> np.ndarray:
    """Return token ids [b, t] for a language model, features [b, t, d] for a layer."""
    rng = np.random.default_rng(0)
    if isinstance(config, ModelConfig):
        return rng.integers(0, config.vocab_size, (BATCH, TOKENS)).astype(np.int32)
    return rng.standard_normal((BATCH, TOKENS, config.d_model))


def _jax_outputs(config: Config, flat: Flat, inputs: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        kind: Any = mc_jax.model.LAYERS.get(type(config), mc_jax.LanguageModel)
        module = kind(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
        load_jax(module, _widened(flat, leaves(jax_weights(module))))
        x = jnp.asarray(inputs)
        if not _is_model(config):
            return np.asarray(_run(*nnx.split(module), x))
        # Run block by block: blocks of the same structure share one compilation.
        x = module.embed(x)
        for block in module.blocks:
            x = _run(*nnx.split(block), x)
        return np.asarray(module._logits(x))


# The program runs only once, so optimisation would take most of the time.
@partial(jax.jit, static_argnums=0, compiler_options=quick_compile())
def _run(graphdef: nnx.GraphDef, state: nnx.State, inputs: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(inputs)


def _torch_outputs(config: Config, flat: Flat, inputs: np.ndarray) -> np.ndarray:
    kind: Any = mc_torch.model.LAYERS.get(type(config), mc_torch.LanguageModel)
    module = kind(config, device="cpu", dtype=torch.float64)
    load_torch(module, _widened(flat, leaves(torch_weights(module))))
    with torch.no_grad():
        return module(torch.from_numpy(inputs)).numpy()


def _widened(flat: Flat, wanted: dict[str, ArraySpec]) -> Flat:
    """Convert to float64; error messages refer to the original parameters."""
    dtype = one_dtype(leaves(flat))
    check_leaves(leaves(flat), {name: leaf._replace(dtype=dtype) for name, leaf in wanted.items()})
    return {name: array.astype(np.float64) for name, array in flat.items()}


def _is_model(config: Config) -> bool:
    return isinstance(config, ModelConfig)


def _checked_config(source: Path, own: Config | None, given: Config | None) -> Config:
    config = own or given
    if config is None:
        raise ValueError(f"{source}: has no configuration: needs --config")
    if given is not None:
        left, right = _values(config.to_dict()), _values(given.to_dict())
        wrong = [
            f"{key} is {left.get(key)!r}, given {right.get(key)!r}"
            for key in sorted(left.keys() | right.keys())
            if left.get(key) != right.get(key)
        ]
        if wrong:
            raise ValueError(f"{source}: has another configuration: {'; '.join(wrong)}")
    return config


def _values(data: dict[str, Any], path: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in data.items():
        nested = isinstance(value, dict)
        values |= _values(value, f"{path}{key}.") if nested else {path + key: value}
    return values


def _check_equal(
    target: Path, given: ModuleWeights, written: ModuleWeights, config: Config
) -> None:
    left, right = given.in_layout("torch"), written.in_layout("torch")
    wrong = [
        name
        for name in sorted(left.keys() | right.keys())
        if name not in left or name not in right or not _same_bits(left[name], right[name])
    ]
    if wrong or written.config != config:
        what = ", ".join(wrong) or "configuration"
        raise ValueError(f"{target}: not written: a different {what} was read back")


def _same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    same_kind = (left.dtype, left.shape) == (right.dtype, right.shape)
    return same_kind and left.tobytes() == right.tobytes()
