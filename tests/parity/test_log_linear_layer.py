"""Log-linear attention layers of both packages: a NumPy oracle, streams, masks and gradients."""

import copy
import dataclasses
import pickle
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
from helpers import oracle_log_linear
from helpers.cases import assert_close
from helpers.oracle_log_linear import LogLinearCase
from mc_core import LogLinearConfig
from mc_core.config import NORM_EPS
from mc_core.optimizer import decays
from mc_core.tree_utils import flatten
from mc_core.weights import by_torch_name, to_torch
from parity.weights import load_jax, load_torch, to_jax

pytestmark = pytest.mark.usefixtures("float64", "strict")
EXACT = 1e-10
CONFIGS = {
    "token": LogLinearConfig(8, 2, 5, chunk_size=4, conv_width=3),
    "head": LogLinearConfig(8, 2, 6, chunk_size=1, retention="head", qk_norm="none"),
    "constant": LogLinearConfig(8, 2, 5, 16, "constant", output_norm="none"),
}
TOKENS = 13
PACKAGES = {"jax": mc_jax, "torch": mc_torch}
both_packages = pytest.mark.parametrize("package", PACKAGES)
every_config = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "head" else ()) for n in CONFIGS]
)


def weights(config: LogLinearConfig) -> dict[str, np.ndarray]:
    """Draw parameters with JAX names."""
    rng = np.random.default_rng(3)
    h, levels = config.num_heads, config.num_levels
    flat = {f"{name}_proj.kernel": rng.standard_normal((8, 8)) for name in ("q", "k", "v", "out")}
    flat["level_proj.kernel"] = 0.5 * rng.standard_normal((8, h * levels))
    flat["level_scale"] = rng.uniform(0.5, 1.5, (h, levels))
    if config.conv_width:
        flat |= {f"{n}_conv.kernel": rng.standard_normal((config.conv_width, 8)) for n in "qkv"}
    if config.retention != "constant":
        flat["coefficients.retention.bias"] = 1 + 0.5 * rng.standard_normal(h)
    if config.retention == "token":
        flat["coefficients.retention.kernel"] = 0.5 * rng.standard_normal((8, h))
    if config.output_norm == "rms":
        flat["output_norm.scale"] = 1 + 0.3 * rng.standard_normal((2, 4))
    return flat


def build(package: str, config: LogLinearConfig) -> Any:
    if package == "jax":
        layer = mc_jax.LogLinearAttentionLayer(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
        load_jax(layer, weights(config))
        return layer
    layer = mc_torch.LogLinearAttentionLayer(config, dtype=torch.float64)
    load_torch(layer, to_torch(weights(config)))
    return layer


def to_package(package: str, x: np.ndarray | None) -> Any:
    if x is None:
        return None
    return jnp.asarray(x) if package == "jax" else torch.tensor(x)


def to_numpy(x: Any) -> np.ndarray:
    return np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)


def compiled(package: str, layer: Any, method: str = "__call__") -> Any:
    """Return a method of a layer, compiled in JAX."""
    call = getattr(layer, method)
    return jax.jit(lambda *args, **options: call(*args, **options)) if package == "jax" else call


def stream(
    package: str,
    layer: Any,
    x: np.ndarray,
    splits: tuple[int, ...],
    mask: np.ndarray | None = None,
    padding: np.ndarray | None = None,
) -> tuple[np.ndarray, Any]:
    """Return the outputs of all calls, and the final cache."""
    cache, outputs = layer.init_cache(len(x), x.shape[1]), []
    extend = compiled(package, layer, "extend")
    for first, last in pairwise((0, *accumulate(splits))):
        part, mask_part, is_padding = (
            to_package(package, None if a is None else a[:, first:last]) for a in (x, mask, padding)
        )
        y, cache = extend(part, cache, mask_part, padding=is_padding)
        outputs.append(to_numpy(y))
    return np.concatenate(outputs, axis=1), cache


def draw_inputs(rows: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, TOKENS, 8)), rng.random((rows, TOKENS)) < 0.7


def case_of(config: LogLinearConfig, x: np.ndarray, mask: np.ndarray) -> LogLinearCase:
    """Compute the arguments of the function with NumPy."""
    p, (b, t, _), h = weights(config), x.shape, config.num_heads
    x = np.where(mask[:, :, None], x, 0.0)

    def heads(name: str) -> np.ndarray:
        y = x @ p[f"{name}_proj.kernel"]
        if config.conv_width:
            kernel, z = p[f"{name}_conv.kernel"], np.zeros_like(y)
            for i in range(t):
                for back in range(min(config.conv_width, i + 1)):
                    z[:, i] += y[:, i - back] * kernel[-1 - back]
            y = z
        y = y.reshape(b, t, h, -1)
        if name == "v" or config.qk_norm == "none":
            return y
        return y / np.sqrt((y * y).sum(-1, keepdims=True) + NORM_EPS)

    logits = (x @ p["level_proj.kernel"]).reshape(b, t, h, config.num_levels)
    level_weights = np.log1p(np.exp(p["level_scale"] * logits))
    retention = np.ones((b, t, h))
    if config.retention != "constant":
        logit = p["coefficients.retention.bias"] + np.zeros((b, t, h))
        if config.retention == "token":
            logit = logit + x @ p["coefficients.retention.kernel"]
        retention = 1 / (1 + np.exp(-logit))
    q, k, v = heads("q"), heads("k"), heads("v")
    return LogLinearCase(q, k, v, level_weights, retention, np.zeros_like(v), mask)


def oracle(config: LogLinearConfig, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    p, y = weights(config), oracle_log_linear.output(case_of(config, x, mask))
    if config.output_norm == "rms":
        y = y / np.sqrt((y * y).mean(-1, keepdims=True) + NORM_EPS) * p["output_norm.scale"]
    return y.reshape(x.shape) @ p["out_proj.kernel"]


@both_packages
@every_config
def test_layer_matches_oracle(package, name):
    """Outputs and states; `level_proj`, softplus, norms, convolution, retention."""
    config, (x, mask) = CONFIGS[name], draw_inputs()
    layer = build(package, config)
    arguments = to_package(package, x), to_package(package, mask)
    y, cache = compiled(package, layer, "forward_with_cache")(*arguments)
    assert_close(to_numpy(y), oracle(config, x, mask), EXACT)
    assert not to_numpy(y)[~mask].any()
    states = oracle_log_linear.states(case_of(config, x, mask))[:, :, :5]
    assert_close(to_numpy(cache.state), states, EXACT)
    assert int(cache.capacity) == 16
    assert to_numpy(cache.position).tolist() == [TOKENS, TOKENS]


@both_packages
@every_config
def test_split_stream_matches_full_pass(package, name):
    config, (x, mask) = CONFIGS[name], draw_inputs()
    layer, expected = build(package, config), oracle(config, x, mask)
    splits = ((5, 1, 1, 5, 1),) if package == "jax" else ((5, 1, 1, 5, 1), (1,) * 13, (13,))
    for split in splits:
        y, cache = stream(package, layer, x, split, mask)
        assert_close(y, expected, EXACT, name=f"{split}")
        states = oracle_log_linear.states(case_of(config, x, mask))[:, :, :5]
        assert_close(to_numpy(cache.state), states, EXACT)


@both_packages
def test_cache_of_full_pass_continues(package):
    config, (x, mask) = CONFIGS["token"], draw_inputs()
    layer, expected = build(package, config), oracle(config, x, mask)
    parts = [[to_package(package, a[:, s]) for a in (x, mask)] for s in (np.s_[:6], np.s_[6:])]
    _, cache = compiled(package, layer, "forward_with_cache")(*parts[0])
    with pytest.raises(ValueError, match=r"max_tokens = 8: .* call grow\(cache, 13\) first"):
        layer.extend(parts[1][0], cache)
    extend = compiled(package, layer, "extend")
    y, _ = extend(parts[1][0], layer.grow(cache, TOKENS), parts[1][1])
    assert_close(to_numpy(y), expected[:, 6:], EXACT)


@both_packages
def test_padded_rows_match_single_rows(package):
    """Padding anywhere, also for a whole call, containing NaN."""
    config, (x, mask) = CONFIGS["token"], draw_inputs(rows=3)
    layer, padding = build(package, config), np.random.default_rng(1).random((3, TOKENS)) < 0.4
    padding[0, :6], padding[1, 6:] = True, True
    poisoned = np.where(padding[..., None], np.nan, x)
    y, cache = stream(package, layer, poisoned, (6, 1, 6), mask, padding)
    for row, is_padding in enumerate(padding):
        here = ~is_padding
        alone = oracle(config, x[row : row + 1, here], mask[row : row + 1, here])
        assert_close(y[row, here], alone[0], EXACT, name=f"row {row}")
    assert not y[padding].any()
    assert to_numpy(cache.position).tolist() == (~padding).sum(1).tolist()


@both_packages
def test_cache_size_is_logarithmic_and_bounded(package):
    config = dataclasses.replace(CONFIGS["token"], num_levels=16)
    layer = build(package, config)
    shapes = [tuple(layer.init_cache(2, n).state.shape) for n in (1, 2, 3, 16, 17, 32768)]
    assert shapes == [(2, 2, levels, 4, 4) for levels in (1, 2, 3, 5, 6, 16)]
    message = r"max_tokens = 32769: must be <= 32768 = 2 \*\* \(num_levels - 1\).*levels >= 17"
    with pytest.raises(ValueError, match=message):
        layer.init_cache(2, 32769)
    small = layer.init_cache(2, 4)
    with pytest.raises(ValueError, match=message):
        layer.grow(small, 32769)
    with pytest.raises(ValueError, match="max_tokens = 3: must be >= 4, the capacity of the cache"):
        layer.grow(small, 3)
    assert layer.init_cache(2, 4, cache_device="host").state.shape[2] == 3
    for call, message in (
        (lambda: layer(to_package(package, np.zeros((1, 3, 5)))), r"must be \[b, t, 8\]"),
        (lambda: layer.init_cache(1, 2, cache_device="disk"), "cache_device = 'disk': must be"),
        (lambda: layer.init_cache(1, 0), "max_tokens = 0: must be >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    short = build(package, dataclasses.replace(config, num_levels=3))
    with pytest.raises(ValueError, match=r"tokens = 5: must be <= 4 = .*num_levels >= 4"):
        short(to_package(package, np.zeros((1, 5, 8))))


@pytest.mark.parametrize("streamed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_agree_between_frameworks(streamed):
    """Gradients of inputs and parameters, with masked and padded tokens."""
    config, (x, mask) = CONFIGS["token"], draw_inputs()
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
    assert_close(to_jax(flat), expected, 1e-9)
    assert all(np.abs(g).max() > 1e-6 for g in flat.values())


def test_level_scales_start_at_one_and_have_no_weight_decay():
    config = LogLinearConfig(8, 2)
    ours = nnx.to_flat_state(
        nnx.state(mc_jax.LogLinearAttentionLayer(config, rngs=nnx.Rngs(0)), nnx.Param)
    )
    jax_names = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in ours}
    torch_layer = mc_torch.LogLinearAttentionLayer(config)
    rows = by_torch_name()
    torch_names = {rows[name].jax: x.detach().numpy() for name, x in torch_layer.named_parameters()}
    for named in (jax_names, torch_names):
        without = {name for name, x in named.items() if not decays(name, x.ndim)}
        assert without == {"level_scale", "output_norm.scale", "coefficients.retention.bias"}
        np.testing.assert_array_equal(named["level_scale"], np.ones((2, 16)))
    assert jax_names.keys() == torch_names.keys()


@pytest.mark.parametrize(
    ("writer", "reader"), [pytest.param("jax", "torch", marks=pytest.mark.slow), ("torch", "jax")]
)
def test_saved_cache_continues_in_both_packages(tmp_path, writer, reader):
    path, config, (x, _) = tmp_path / "stream.safetensors", CONFIGS["token"], draw_inputs()
    _, cache = stream(writer, build(writer, config), x[:, :6], (6,))
    cache = build(writer, config).grow(cache, TOKENS)
    PACKAGES[writer].save_cache(path, cache, config)
    expected = oracle(config, x, np.ones((2, TOKENS), bool))[:, 6:]
    for package in (writer, reader):
        other = build(package, config)
        loaded = PACKAGES[package].load_cache(path, other)
        y, _ = other.extend(to_package(package, x[:, 6:]), loaded)
        assert_close(to_numpy(y), expected, EXACT, name=package)
    with pytest.raises(ValueError, match=r"LogLinearConfig.retention = 'head': must be 'token'"):
        PACKAGES[reader].load_cache(
            path, build(reader, dataclasses.replace(config, retention="head"))
        )


@both_packages
def test_selected_rows_continue_independently(package):
    config, (x, _) = CONFIGS["token"], draw_inputs(rows=3)
    layer, rows = build(package, config), [2, 0, 0]
    extend = compiled(package, layer, "extend")
    _, cache = extend(to_package(package, x[:, :6]), layer.init_cache(3, TOKENS))
    y, _ = extend(to_package(package, x[rows, 6:]), cache.take(rows))
    assert_close(to_numpy(y), oracle(config, x, np.ones((3, TOKENS), bool))[rows, 6:], EXACT)
    with pytest.raises(ValueError, match=r"rows\[0\] = 3: must be in 0\.\.2"):
        cache.take([3])
    assert layer.init_cache(3, 4).take([]).state.shape[0] == 0
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert type(other) is type(cache)
        assert_close(
            {n: to_numpy(leaf) for n, leaf in flatten(other)},
            {n: to_numpy(leaf) for n, leaf in flatten(cache)},
            0,
        )


@both_packages
def test_bfloat16_layer_has_float32_states(package):
    """Errors are those of bfloat16 products; states, level weights and decay are float32."""
    config, (x, mask) = CONFIGS["token"], draw_inputs()
    if package == "jax":
        options = {"rngs": nnx.Rngs(0), "dtype": jnp.bfloat16}
        layer = mc_jax.LogLinearAttentionLayer(config, **options)
        load_jax(layer, {name: w.astype(np.float32) for name, w in weights(config).items()})
        given, short = jnp.asarray(x, jnp.float32), jnp.asarray
    else:
        layer, short = build("torch", config).float(), torch.tensor
        given = torch.tensor(x, dtype=torch.bfloat16)
    y, cache = compiled(package, layer, "forward_with_cache")(given, short(mask))
    assert str(y.dtype).removeprefix("torch.") == ("float32" if package == "jax" else "bfloat16")
    assert {str(a.dtype).removeprefix("torch.") for _, a in flatten(cache)} == {"float32", "int32"}
    y = to_numpy(y if package == "jax" else y.float())
    assert_close(y, oracle(config, x, mask), 0.03)


@both_packages
def test_empty_batch(package):
    layer = build(package, CONFIGS["token"])
    x, mask = to_package(package, np.zeros((0, 9, 8))), to_package(package, np.ones((0, 9), bool))

    def run(x, mask):
        cache = layer.init_cache(0, 16)
        return layer.forward_with_cache(x, mask), layer.extend(x, cache, padding=~mask)

    (y, cache), (z, after) = jax.jit(run)(x, mask) if package == "jax" else run(x, mask)
    assert y.shape == z.shape == (0, 9, 8)
    assert cache.state.shape == after.state.shape == (0, 2, 5, 4, 4)


def test_compiled_stream_past_capacity_is_nan():
    layer, (x, _) = build("jax", CONFIGS["token"]), draw_inputs()
    extend, cache = jax.jit(lambda x, cache: layer.extend(x, cache)), layer.init_cache(2, 4)
    for first, capacity in ((0, True), (3, False)):
        y, cache = extend(jnp.asarray(x)[:, first : first + 3], cache)
        assert np.isnan(y).all() != capacity


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 6])
def test_torch_extend_compiles_once(size):
    layer, (x, _) = build("torch", CONFIGS["token"]), draw_inputs()
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


@pytest.mark.slow
def test_torch_full_pass_compiles_without_graph_breaks():
    layer, (x, mask) = build("torch", CONFIGS["token"]), draw_inputs()
    torch._dynamo.reset()
    run = torch.compile(layer.forward_with_cache, fullgraph=True, backend="aot_eager")
    x, mask = torch.tensor(x), torch.tensor(mask)
    with torch.no_grad():
        assert_close(run(x, mask)[0], layer(x, mask), EXACT)
