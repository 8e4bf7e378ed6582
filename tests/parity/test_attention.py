"""Attention layers of both packages: a NumPy oracle, streams, masks and gradients."""

import dataclasses
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mc_jax
import mc_torch
from helpers.cases import assert_close
from mc_core import AttentionConfig
from mc_core.config import NORM_EPS
from mc_core.tree_utils import flatten
from mc_core.weights import to_torch
from parity.weights import load_jax, load_torch
from parity.weights import to_jax as in_jax_layout

pytestmark = pytest.mark.usefixtures("float64", "strict")
EXACT = 1e-10
WINDOWS = {"full": None, "blocks": 3, "band": 7, "itself": 1, "longer": 40}
CONFIGS = {
    f"{name}-conv{width}": AttentionConfig(8, 2, window, 100.0, width, norm)
    for name, window in WINDOWS.items()
    for width, norm in ((0, "rms"), (3, "none"))
}
TOKENS = 13
# The other windows stream alike.
STREAMED = pytest.mark.parametrize(
    "name",
    [
        pytest.param(f"{name}-conv3", marks=pytest.mark.slow if name in ("band", "longer") else ())
        for name in WINDOWS
    ],
)
PACKAGES = ("jax", "torch")
BOTH_PACKAGES = pytest.mark.parametrize("package", PACKAGES)


def weights(config: AttentionConfig) -> dict[str, np.ndarray]:
    """Draw parameters with JAX names."""
    rng = np.random.default_rng(3)
    flat = {f"{name}_proj.kernel": rng.standard_normal((8, 8)) for name in ("q", "k", "v", "out")}
    if config.conv_width:
        flat |= {f"{n}_conv.kernel": rng.standard_normal((config.conv_width, 8)) for n in "qkv"}
    if config.output_norm == "rms":
        flat["output_norm.scale"] = 1 + 0.3 * rng.standard_normal((2, 4))
    return flat


def build(package: str, config: AttentionConfig) -> Any:
    if package == "jax":
        layer = mc_jax.AttentionLayer(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
        load_jax(layer, weights(config))
        return layer
    layer = mc_torch.AttentionLayer(config, dtype=torch.float64)
    load_torch(layer, to_torch(weights(config)))
    return layer


def to_package(package: str, x: np.ndarray | None) -> Any:
    if x is None:
        return None
    return jnp.asarray(x) if package == "jax" else torch.tensor(x)


def to_numpy(x: Any) -> np.ndarray:
    return np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)


def full_pass(
    package: str, layer: Any, x: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    x, mask = to_package(package, x), to_package(package, mask)
    if package == "torch":
        return to_numpy(layer(x, mask))
    graph, state = nnx.split(layer)
    return to_numpy(jax.jit(lambda s, x: nnx.merge(graph, s)(x, mask))(state, x))


def stream(
    package: str,
    layer: Any,
    x: np.ndarray,
    splits: tuple[int, ...],
    mask: np.ndarray | None = None,
    padding: np.ndarray | None = None,
    **options: Any,
) -> tuple[np.ndarray, Any]:
    """Return the outputs of all calls, and the final cache."""
    cache, outputs, extend = layer.init_cache(len(x), x.shape[1], **options), [], layer.extend
    if package == "jax":
        extend = jax.jit(lambda *args, padding: layer.extend(*args, padding=padding))
    for first, last in pairwise((0, *accumulate(splits))):
        part, mask_part, is_padding = (
            to_package(package, None if a is None else a[:, first:last]) for a in (x, mask, padding)
        )
        y, cache = extend(part, cache, mask_part, padding=is_padding)
        outputs.append(to_numpy(y))
    return np.concatenate(outputs, axis=1), cache


def draw_inputs(name: str = "none", rows: int = 2) -> tuple[np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((rows, TOKENS, 8)), rng.random((rows, TOKENS)) < 0.6
    return x, mask if name == "some" else None


def oracle(config: AttentionConfig, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Compute attention token by token, with RoPE as complex multiplication."""
    p, (b, t, d), h = weights(config), x.shape, config.num_heads
    mask = np.ones((b, t), bool) if mask is None else mask
    x, half = np.where(mask[:, :, None], x, 0.0), d // h // 2

    def heads(name: str) -> np.ndarray:
        y = x @ p[f"{name}_proj.kernel"]
        if config.conv_width:
            kernel, z = p[f"{name}_conv.kernel"], np.zeros_like(y)
            for i in range(t):
                for back in range(min(config.conv_width, i + 1)):
                    z[:, i] += y[:, i - back] * kernel[-1 - back]
            y = z
        return y.reshape(b, t, h, -1)

    def rotate(y: np.ndarray) -> np.ndarray:
        angle = np.arange(t)[:, None] * config.rope_base ** (-2 * np.arange(half) / (2 * half))
        z = (y[..., :half] + 1j * y[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([z.real, z.imag], axis=-1)

    q, k, v, y = rotate(heads("q")), rotate(heads("k")), heads("v"), np.zeros((b, t, h, d // h))
    for row, i, head in np.ndindex(b, t, h):
        if not mask[row, i]:
            continue
        first = 0 if config.window is None else max(0, i + 1 - config.window)
        visible = [j for j in range(first, i + 1) if mask[row, j]]
        share = np.exp(k[row, visible, head] @ q[row, i, head] / np.sqrt(d // h))
        y[row, i, head] = share @ v[row, visible, head] / share.sum()
    if config.output_norm == "rms":
        y = y / np.sqrt((y * y).mean(-1, keepdims=True) + NORM_EPS) * p["output_norm.scale"]
    return y.reshape(b, t, d) @ p["out_proj.kernel"]


@BOTH_PACKAGES
@pytest.mark.parametrize("mask", ["none", "some"])
@pytest.mark.parametrize("name", CONFIGS)
def test_layer_matches_softmax_attention(package, name, mask):
    config, (x, mask) = CONFIGS[name], draw_inputs(mask)
    y = full_pass(package, build(package, config), x, mask)
    assert_close(y, oracle(config, x, mask), EXACT)
    if mask is not None:
        assert not y[~mask].any()


@BOTH_PACKAGES
@STREAMED
def test_split_stream_matches_full_pass(package, name):
    config, (x, mask) = CONFIGS[name], draw_inputs("some")
    layer = build(package, config)
    for splits in ((5, 1, 1, 5, 1), (1,) * TOKENS):
        y, _ = stream(package, layer, x, splits, mask)
        assert_close(y, full_pass(package, layer, x, mask), EXACT, name=f"{splits}")


@BOTH_PACKAGES
@STREAMED
def test_padded_rows_match_single_rows(package, name):
    """Padding anywhere, also for a whole call, containing NaN."""
    config, (x, _) = CONFIGS[name], draw_inputs(rows=3)
    layer, padding = build(package, config), np.random.default_rng(1).random((3, TOKENS)) < 0.4
    padding[0, :6], padding[1, 6:] = True, True
    mask = np.random.default_rng(2).random((3, TOKENS)) < 0.7
    poisoned = np.where(padding[..., None], np.nan, x)
    y, cache = stream(package, layer, poisoned, (6, 1, 6), mask, padding)
    for row, is_padding in enumerate(padding):
        here = ~is_padding
        alone = oracle(config, x[row : row + 1, here], mask[row : row + 1, here])
        assert_close(y[row, here], alone[0], EXACT, name=f"row {row}")
    assert not y[padding].any()
    assert to_numpy(cache.position).tolist() == (~padding).sum(1).tolist()


@BOTH_PACKAGES
def test_window_cache_size_is_bounded(package):
    def cache_bytes(config: AttentionConfig, tokens: int, **options: Any) -> int:
        cache = build(package, config).init_cache(2, tokens, **options)
        return sum(to_numpy(x).nbytes for _, x in flatten(cache))

    window, full = CONFIGS["blocks-conv3"], CONFIGS["full-conv3"]
    assert cache_bytes(window, 100) == cache_bytes(window, 10_000) < cache_bytes(full, 10)
    assert cache_bytes(full, 2000) - cache_bytes(full, 1000) == 2 * 1000 * (2 * 8 * 8 + 1)
    short = jnp.bfloat16 if package == "jax" else torch.bfloat16
    cache = build(package, full).init_cache(2, 10, cache_dtype=short)
    assert cache.keys.dtype == cache.values.dtype == short


@pytest.mark.parametrize("package", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
@pytest.mark.parametrize(
    "name",
    [
        "blocks-conv3",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("full-conv3", "longer-conv3")),
    ],
)
def test_cache_grows_and_enforces_capacity(package, name):
    layer, (x, _) = build(package, CONFIGS[name]), draw_inputs()
    part = to_package(package, x)
    first, cache = layer.extend(part[:, :4], layer.init_cache(2, 4))
    with pytest.raises(
        ValueError, match=r"max_tokens = 4: the call would advance position 4 to 5: call grow\("
    ):
        layer.extend(part[:, 4:5], cache)
    with pytest.raises(ValueError, match="max_tokens = 3: must be >= 4, the capacity of the cache"):
        layer.grow(cache, 3)
    second, cache = layer.extend(part[:, 4:], layer.grow(cache, TOKENS))
    y = np.concatenate([to_numpy(first), to_numpy(second)], axis=1)
    assert_close(y, full_pass(package, layer, x), EXACT)
    assert int(cache.capacity) == TOKENS


@BOTH_PACKAGES
def test_invalid_arguments_are_rejected(package):
    layer, (x, _) = build(package, CONFIGS["full-conv0"]), draw_inputs()
    x = to_package(package, x)
    for call, message in (
        (lambda: layer(x[..., :5]), r"x has shape \(2, 13, 5\): must be \[b, t, 8\]"),
        (lambda: layer.extend(x, layer.init_cache(3, 20)), r"must be \[b, t, 8\] with b = 3"),
        (lambda: layer.init_cache(-1, 5), "batch = -1: must be >= 0"),
        (lambda: layer.init_cache(1, 0), "max_tokens = 0: must be >= 1"),
        (lambda: layer.init_cache(1, 2, cache_device="disk"), "cache_device = 'disk': must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("name", "streamed"),
    [
        ("full-conv3", False),
        pytest.param("full-conv3", True, marks=pytest.mark.slow),
        ("blocks-conv0", False),
        ("blocks-conv0", True),
        pytest.param("band-conv3", False, marks=pytest.mark.slow),
        pytest.param("band-conv3", True, marks=pytest.mark.slow),
    ],
)
def test_gradients_agree_between_frameworks(name, streamed):
    """Gradients of inputs and parameters, with masked and padded tokens."""
    config, (x, mask) = CONFIGS[name], draw_inputs("some")
    cotangent = np.random.default_rng(5).standard_normal(x.shape)
    padding = np.random.default_rng(6).random((2, TOKENS)) < 0.3
    padding[0, :8] = True

    def run(layer: Any, x: Any, to: Any) -> Any:
        if not streamed:
            return (layer(x, to(mask)) * to(cotangent)).sum()
        cache, total = layer.init_cache(2, TOKENS), 0.0
        for here in (slice(0, 8), slice(8, 9), slice(9, TOKENS)):
            y, cache = layer.extend(
                x[:, here], cache, to(mask[:, here]), padding=to(padding[:, here])
            )
            total = total + (y * to(cotangent[:, here])).sum()
        return total

    graph, state = nnx.split(build("jax", config), nnx.Param)
    value, (by_weight, by_x) = jax.jit(
        jax.value_and_grad(lambda s, x: run(nnx.merge(graph, s), x, jnp.asarray), argnums=(0, 1))
    )(state, jnp.asarray(x))
    layer, given = build("torch", config), torch.tensor(x, requires_grad=True)
    other = run(layer, given, torch.tensor)
    named = dict(layer.named_parameters())
    actual = torch.autograd.grad(other, [given, *named.values()])
    assert_close(to_numpy(other), value, 1e-9)
    assert_close(actual[0].numpy(), by_x, 1e-9)
    expected = {
        ".".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(by_weight)
    }
    flat = dict(zip(named, (g.numpy() for g in actual[1:]), strict=True))
    assert_close(in_jax_layout(flat), expected, 1e-9)
    assert all(np.abs(g).max() > 1e-6 for g in flat.values())


@BOTH_PACKAGES
def test_softmax_is_float32_with_bfloat16_compute(package):
    """Section 8: 512 equal weights, each below bfloat16's resolution at 1, sum to 1."""
    config = AttentionConfig(8, 2, output_norm="none")
    layer, (dtype, ones) = (
        build(package, config),
        {
            "jax": (jnp.bfloat16, lambda: jnp.ones((1, 512, 8), jnp.bfloat16)),
            "torch": (torch.bfloat16, lambda: torch.ones(1, 512, 8, dtype=torch.bfloat16)),
        }[package],
    )
    if package == "jax":
        layer = mc_jax.AttentionLayer(config, rngs=nnx.Rngs(0), dtype=dtype)
        load_jax(layer, {k: v.astype(np.float32) for k, v in weights(config).items()})
        y = jax.jit(lambda x: layer(x))(ones())
    else:
        y = layer.float()(ones())
    assert y.dtype == dtype
    last = np.asarray(jnp.asarray(y, jnp.float32) if package == "jax" else y.float().detach())
    assert_close(last[0, -1], oracle(config, np.ones((1, 1, 8)), None)[0, 0], 0.01)


@BOTH_PACKAGES
def test_offloaded_keys_and_values(package):
    (x, mask), layer = draw_inputs("some"), build(package, CONFIGS["blocks-conv3"])
    near, far = (
        stream(package, layer, x, (4, 1, 8), mask, cache_device=place)
        for place in ("device", "host")
    )
    np.testing.assert_array_equal(near[0], far[0])
    if package == "jax":
        assert far[1].keys.sharding.memory_kind == "pinned_host"


def test_compiled_stream_past_capacity_is_nan():
    layer, (x, _) = build("jax", CONFIGS["blocks-conv0"]), draw_inputs()
    extend, cache = jax.jit(lambda x, cache: layer.extend(x, cache)), layer.init_cache(2, 4)
    for first, capacity in ((0, True), (3, False)):
        y, cache = extend(jnp.asarray(x)[:, first : first + 3], cache)
        assert np.isnan(y).all() != capacity


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param("full-conv3", 1, marks=pytest.mark.slow),
        pytest.param("full-conv3", 3, marks=pytest.mark.slow),
        pytest.param("blocks-conv3", 1, marks=pytest.mark.slow),
        pytest.param("blocks-conv3", 3, marks=pytest.mark.slow),
    ],
)
def test_torch_extend_compiles_once(name, size):
    layer, (x, _) = build("torch", CONFIGS[name]), draw_inputs()
    x, cache = torch.tensor(x), layer.init_cache(2, 12)
    torch._dynamo.reset()
    run, outputs = torch.compile(layer.extend, fullgraph=True, backend="aot_eager"), []
    with torch.no_grad():
        y, cache = run(x[:, :size], cache)
        outputs.append(y)
        with torch.compiler.set_stance("fail_on_recompile"):
            for first in range(size, 12, size):
                y, cache = run(x[:, first : first + size], cache)
                outputs.append(y)
            past, _ = run(x[:, :size], cache)
        assert_close(torch.cat(outputs, 1), layer(x[:, :12]), EXACT)
    assert past.isnan().all(), "a compiled program cannot raise"


def test_attention_configuration_round_trips():
    for config in CONFIGS.values():
        assert AttentionConfig.from_dict(config.to_dict()) == config
    assert {dataclasses.replace(CONFIGS["full-conv0"], window=w).slots(9) for w in (None, 9)} == {9}
