"""`mc bench decode`: time and bytes per token after a long context, compared with attention."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.timing import WARM_CACHE_NOTE, Timing, alternate, ratio
from mc_core import MCConfig
from mc_core.cache_checks import NO_SLOT
from mc_core.errors import UserError
from mc_core.footprint import cache_footprint, kv_bytes
from mc_core.memories import MEMORIES
from mc_core.segmentation import check_streaming_config
from mc_core.tables import ResultTable, Row
from mc_core.tree_utils import flatten
from mc_jax import Cache, MemoryCachingLayer
from mc_jax.sharding import local, make_mesh, parameter_shardings
from parity.environment import result_table

CAPACITY = 128  # cache capacity after the context, more tokens than are timed
PREFILLS = 5  # number of timed runs of a prompt, per method
ATTENTION = "attention"


class Decoder(NamedTuple):
    """A layer with the cache of a stream."""

    name: str
    step: Callable[[], Any]  # decodes one token and waits for the result
    held: int  # bytes of its cache
    read: int  # bytes of the cache that a token reads


def run(
    configs: Sequence[MCConfig],
    contexts: Sequence[int],
    prompt: int,
    runs: int,
    seed: int,
    devices: int = 1,
) -> ResultTable:
    """Time decoding after each context length, prefill of a prompt, and compact cache formats.

    Args:
        configs: layers of equal width.
        contexts: context lengths.
        prompt: tokens of a prompt, timed in one call and in single steps; 0: no prompt.
        runs: number of timed tokens per layer.
        seed: random seed of parameters and memories.
        devices: number of devices; a prompt is also timed with its heads split over them.

    Raises:
        UserError: there are fewer devices, or the heads cannot be split over them.
    """
    places = local(devices, "--devices")
    if configs and configs[0].num_heads % devices:
        raise UserError(f"--devices {devices}: must divide --heads {configs[0].num_heads}")
    notes = ["one stream, float32; random memories, which do not change the cost of a step"]
    notes.append(WARM_CACHE_NOTE)
    rows = compare(configs, contexts, runs, seed)
    for config in configs if prompt else ():
        one = compare_prefill(config, prompt, seed, places)
        notes.append(
            f"{_name(config)}, {prompt:,} tokens: {one['prefill_s']:.3g} s in one call, "
            f"{one['steps_s']:.3g} s in single steps: {one['ratio']:.1f} times "
            f"(outputs differ by {one['difference']:.1e})"
        )
        if devices > 1:
            notes[-1] += (
                f"; with its heads on {devices} devices {one['split_s']:.3g} s: "
                f"{one['split_ratio']:.1f} times"
            )
        for kept in compare_storage(config, prompt, seed) if config.slots(1) else ():
            notes.append(
                f"{_name(config)}, cached memories in {kept['cache_dtype']} on "
                f"{kept['cache_device']}: {kept['memory_bytes'] / 2**20:.3g} MiB, "
                f"output off by {kept['relative_error']:.1e}"
            )
    return result_table("A token after a context", rows, notes)


def compare(
    configs: Sequence[MCConfig], contexts: Sequence[int], runs: int, seed: int
) -> list[Row]:
    """Time one token of every layer and of attention after each context, in alternating runs.

    The memories are random; the cost of a step does not depend on their values.

    Args:
        configs: layers of equal width.
        contexts: context lengths.
        runs: number of timed tokens per layer.
        seed: random seed of parameters and memories.

    Returns:
        One row of plain values per context and layer.
    """
    rows = []
    for context in contexts:
        decoders = [_attention(configs[0], context, seed)]
        decoders += [_layer(config, context, seed) for config in configs]
        timings = alternate({one.name: one.step for one in decoders}, runs=runs, warmup=3)
        base = timings[ATTENTION]
        rows += [_row(context, one, timings[one.name], base) for one in decoders]
    return rows


def compare_prefill(
    config: MCConfig,
    tokens: int,
    seed: int,
    devices: Sequence[jax.Device] = (),
    runs: int = PREFILLS,
) -> Row:
    """Time a prompt in one call and in single steps, alternating; ratios are medians over turns.

    Steps are dispatched asynchronously, because all tokens are known. They run on one device; with
    several `devices`, the call is also timed with its heads split over them.
    """
    layer, graphdef, state = _build(config, seed)
    x = jax.random.normal(jax.random.key(seed), (1, tokens, config.d_model))
    parts = [x[:, start : start + 1] for start in range(tokens)]
    empty = jax.block_until_ready(layer.init_cache(1, tokens))

    def extend(state: Any, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return nnx.merge(graphdef, state).extend(x, cache)

    first, step = jax.jit(extend), jax.jit(extend, donate_argnums=2)

    def whole(state: Any) -> jax.Array:
        return jax.block_until_ready(first(state, x, empty))[0]

    def steps() -> list[jax.Array]:
        y, cache = first(state, parts[0], empty)
        outputs = [y]
        for part in parts[1:]:
            y, cache = step(state, part, cache)
            outputs.append(y)
        return jax.block_until_ready((outputs, cache))[0]

    subjects: dict[str, Callable[[], Any]] = {"whole": partial(whole, state), "steps": steps}
    if len(devices) > 1:
        mesh = make_mesh(data=1, heads=-1, devices=devices)
        split = jax.device_put(state, parameter_shardings(layer, mesh))
        subjects["split"] = partial(whole, split)
    timings = alternate(subjects, runs=runs, warmup=2)  # the first call compiles
    expected = jnp.concatenate(steps(), axis=1)
    row: Row = {
        "layer": _name(config),
        "tokens": tokens,
        "prefill_s": timings["whole"].median,
        "steps_s": timings["steps"].median,
        "ratio": ratio(timings["steps"], timings["whole"])[0],
        "difference": _relative(whole(state), expected),
    }
    if "split" in subjects:
        row |= {
            "split_s": timings["split"].median,
            "split_ratio": ratio(timings["steps"], timings["split"])[0],
            "difference": max(row["difference"], _relative(subjects["split"](), expected)),
        }
    return row


def compare_storage(config: MCConfig, tokens: int, seed: int) -> list[Row]:
    """Return size and output error of cached memories in bfloat16 and on the host."""
    layer, _, _ = _build(config, seed)
    x = jax.random.normal(jax.random.key(seed), (1, tokens, config.d_model))
    exact, rows = None, []
    for dtype, place in (("float32", "device"), ("bfloat16", "device"), ("float32", "host")):
        cache = layer.init_cache(1, tokens, cache_dtype=jnp.dtype(dtype), cache_device=place)
        y, cache = layer.extend(x, cache)
        exact = y if exact is None else exact
        held = sum(w.nbytes for w in cache.stored.weights)
        rows.append(
            {
                "layer": _name(config),
                "tokens": tokens,
                "cache_dtype": dtype,
                "cache_device": place,
                "memory_bytes": held,
                "relative_error": _relative(y, exact),
            }
        )
    return rows


def layer(
    kind: str,
    aggregation: str,
    *,
    width: int,
    heads: int,
    segment_size: int,
    chunk_size: int,
    segmentation: str = "constant",
) -> MCConfig:
    """Return a layer with the defaults of its kind.

    Raises:
        ValueError: a value is not allowed; the message has field, value and allowed values.
    """
    config = MCConfig(
        width,
        heads,
        MEMORIES[kind](),
        aggregation,
        segmentation=segmentation,
        segment_size=segment_size,
        chunk_size=chunk_size,
    )
    check_streaming_config(config)
    return config


def _row(context: int, one: Decoder, timing: Timing, base: Timing) -> Row:
    wall, processor = ratio(timing, base)
    return {
        "layer": one.name,
        "context": context,
        "ms": 1e3 * timing.median,
        "±": timing.spread,
        "against attention": wall,
        "in processor time": processor,
        "cache KiB": one.held / 2**10,
        "read KiB": one.read / 2**10,
    }


def _name(config: MCConfig) -> str:
    name = f"{config.memory.kind} + {config.aggregation}"
    return f"{name}, {config.segmentation}" if config.has_buckets else name


def _build(config: MCConfig, seed: int) -> tuple[MemoryCachingLayer, Any, Any]:
    layer = MemoryCachingLayer(config, rngs=nnx.Rngs(seed))
    return layer, *nnx.split(layer)


def _layer(config: MCConfig, context: int, seed: int) -> Decoder:
    layer, graphdef, state = _build(config, seed)
    cache = layer.init_cache(1, context + CAPACITY)
    held = sum(leaf.nbytes for _, leaf in flatten(cache))
    weights = tuple(
        0.1 * jax.random.normal(jax.random.key(seed), w.shape) for w in cache.stored.weights
    )
    pool = jax.random.normal(jax.random.key(seed), cache.stored.pool.shape)
    slot = NO_SLOT if config.has_buckets else (context - 1) // config.segment_size
    cache = cache._replace(
        stored=cache.stored._replace(weights=weights, pool=pool),
        position=jnp.full_like(cache.position, context),
        slot=jnp.full_like(cache.slot, slot),
    )

    @partial(jax.jit, donate_argnums=2)
    def step(state: Any, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return nnx.merge(graphdef, state).extend(x, cache)

    run = _stepper(partial(step, state), config, cache)
    return Decoder(_name(config), run, held, cache_footprint(config, context).read)


def _attention(config: MCConfig, context: int, seed: int) -> Decoder:
    """Return a softmax attention layer of the same width, with a KV cache."""
    d, h, width = config.d_model, config.num_heads, config.head_dim
    keys = jax.random.split(jax.random.key(seed), 6)
    weights = [jax.random.normal(key, (d, d)) * d**-0.5 for key in keys[:4]]
    shape = (1, context + CAPACITY, h, width)
    kv = tuple(jax.random.normal(key, shape) for key in keys[4:])

    @partial(jax.jit, donate_argnums=2)
    def step(weights: Any, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        (old_k, old_v), position = cache
        q, k, v = ((x @ w).reshape(1, 1, h, width) for w in weights[:3])
        k = jax.lax.dynamic_update_slice_in_dim(old_k, k, position, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(old_v, v, position, axis=1)
        seen = jnp.full((1,), position + 1, jnp.int32)
        y = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=seen)
        return y.reshape(1, 1, d) @ weights[3], ((k, v), position + 1)

    cache = kv, jnp.asarray(context, jnp.int32)
    run = _stepper(partial(step, weights), config, cache)
    return Decoder(ATTENTION, run, sum(x.nbytes for x in kv), kv_bytes(config, context))


def _stepper(step: Callable[..., Any], config: MCConfig, cache: Any) -> Callable[[], Any]:
    x = jax.random.normal(jax.random.key(1), (1, 1, config.d_model))

    def run() -> Any:
        nonlocal cache
        y, cache = step(x, cache)
        return jax.block_until_ready((y, cache))

    return run


def _relative(actual: jax.Array, expected: jax.Array) -> float:
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))
