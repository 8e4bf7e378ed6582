"""Caches in files: both packages continue the stream, and reject other files."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mc_jax
import mc_torch
from mc_core import MCConfig, ModelConfig, SWLAConfig, TitansConfig
from mc_core.tree_utils import flatten
from parity.weights import load_torch, to_torch

pytestmark = pytest.mark.usefixtures("float64", "strict")

LAYER = MCConfig(8, 2, TitansConfig(expansion=1), segment_size=4, chunk_size=3, conv_width=4)
OTHER = MCConfig(8, 2, TitansConfig(expansion=1), segment_size=5, chunk_size=3, conv_width=4)
MODEL = ModelConfig(
    17, 2, MCConfig(8, 2, SWLAConfig(), "ssc", segment_size=4, chunk_size=3, conv_width=4)
)
HYBRID = dataclasses.replace(
    MODEL, num_layers=3, mixers=("window", "memory", "attention"), attention_window=5
)
PACKAGES = pytest.mark.parametrize("package", [mc_jax, mc_torch], ids=["jax", "torch"])


def build(package: Any, config: Any) -> Any:
    """Build a layer or model in float64, with the same weights in both packages."""
    kind = "LanguageModel" if isinstance(config, ModelConfig) else "MemoryCachingLayer"
    left = getattr(mc_jax, kind)(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    if package is mc_jax:
        return left
    right = mc_torch.__dict__[kind](config, dtype=torch.float64)
    load_torch(right, to_torch(mc_jax.pretrained.get_weights(left)))
    return right


def tokens(package: Any, config: Any) -> Any:
    rng = np.random.default_rng(0)
    if isinstance(config, ModelConfig):
        x = rng.integers(17, size=(2, 13)).astype(np.int32)
    else:
        x = rng.standard_normal((2, 13, 8))
    return jnp.asarray(x) if package is mc_jax else torch.tensor(x)


def start_stream(package: Any, config: Any, cache_dtype: Any = None) -> tuple[Any, Any, Any]:
    """Return a module, the remaining tokens of a stream, and its cache inside a chunk."""
    module, x = build(package, config), tokens(package, config)
    cache = module.init_cache(2, 13, cache_dtype=cache_dtype)
    return module, x[:, 6:], plain(extend(module, x[:, :6], cache)[1])


@nnx.jit
def extend_compiled(module: nnx.Module, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    return module.extend(x, cache)


def extend(module: Any, x: Any, cache: Any) -> tuple[Any, Any]:
    """Run `module.extend`, in JAX as one program."""
    if isinstance(module, nnx.Module):
        return extend_compiled(module, x, cache)
    return module.extend(x, cache)


def plain(tree: Any) -> Any:
    return mc_torch.numerics.tree_map(lambda x: getattr(x, "detach", lambda: x)(), tree)


def array(x: Any) -> np.ndarray:
    return np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)


@PACKAGES
@pytest.mark.parametrize(
    "config",
    [
        LAYER,
        pytest.param(MODEL, marks=pytest.mark.slow),
        pytest.param(HYBRID, marks=pytest.mark.slow),
    ],
    ids=["layer", "model", "hybrid"],
)
def test_saved_cache_continues_stream(tmp_path, package, config):
    """With convolutions and bfloat16 memories."""
    path = tmp_path / "stream.safetensors"
    short = jnp.bfloat16 if package is mc_jax else torch.bfloat16
    module, rest, cache = start_stream(package, config, short)
    package.save_cache(path, cache, config)
    loaded = package.load_cache(path, module)
    for (name, saved), (same, read) in zip(flatten(cache), flatten(loaded), strict=True):
        assert (name, saved.dtype) == (same, read.dtype)
        assert bool((saved == read).all()), name
    outputs = [array(extend(module, rest, one)[0]) for one in (cache, loaded)]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize(
    "config", [LAYER, pytest.param(HYBRID, marks=pytest.mark.slow)], ids=["layer", "hybrid"]
)
@pytest.mark.parametrize(("writer", "reader"), [(mc_jax, mc_torch), (mc_torch, mc_jax)])
def test_saved_cache_continues_in_other_package(tmp_path, writer, reader, config):
    path = tmp_path / "stream.safetensors"
    module, rest, cache = start_stream(writer, config)
    writer.save_cache(path, cache, config)
    expected = array(extend(module, rest, cache)[0])
    other = build(reader, config)
    y, _ = extend(other, tokens(reader, config)[:, 6:], reader.load_cache(path, other))
    np.testing.assert_allclose(array(y), expected, rtol=0, atol=1e-12)


@PACKAGES
def test_mismatched_cache_files_are_rejected(tmp_path, package):
    path = tmp_path / "stream.safetensors"
    module = build(package, LAYER)
    cache = plain(module.init_cache(2, 13))
    package.save_cache(path, cache, LAYER)
    with pytest.raises(
        ValueError, match=r"MCConfig.segment_size = 5: must be 4, the value in the file"
    ):
        package.load_cache(path, build(package, OTHER))
    with pytest.raises(ValueError, match="MemoryCachingLayer"):
        package.load_cache(path, build(package, MODEL))
    broken = cache._replace(pool=cache.pool[:, :1], conv=cache.conv[:2])
    package.save_cache(path, broken, LAYER)
    message = r"(?s)tensors do not match.*missing conv.2.*must be pool float64\[2, 2, 4\]"
    with pytest.raises(ValueError, match=message):
        package.load_cache(path, module)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"stream\.safetensors"):
        package.load_cache(path, module)


@PACKAGES
@pytest.mark.parametrize(
    "config", [LAYER, pytest.param(HYBRID, marks=pytest.mark.slow)], ids=["layer", "hybrid"]
)
def test_loaded_cache_has_device_of_new_cache(tmp_path, package, config):
    path = tmp_path / "stream.safetensors"
    module, rest, cache = start_stream(package, config)
    package.save_cache(path, cache, config)
    far = package.load_cache(path, module, cache_device="host")
    anchored = module.init_cache(2, 13, cache_device="host")
    places = [[place(x) for _, x in flatten(tree)] for tree in (far, anchored)]
    assert places[0] == places[1]
    if package is mc_jax:
        assert len(set(places[0])) == 2
    outputs = [array(extend(module, rest, one)[0]) for one in (cache, far)]
    np.testing.assert_array_equal(*outputs)


def place(x: Any) -> str:
    return str(x.device) if isinstance(x, torch.Tensor) else x.sharding.memory_kind


def test_loading_float64_requires_x64(tmp_path):
    path = tmp_path / "stream.safetensors"
    _, _, cache = start_stream(mc_torch, LAYER)
    mc_torch.save_cache(path, cache, LAYER)
    with jax.enable_x64(False):
        single = mc_jax.MemoryCachingLayer(LAYER, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"of float64: needs jax.enable_x64\(True\)"):
            mc_jax.load_cache(path, single)
