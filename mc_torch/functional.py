"""Memory Caching without parameters: write, cache, gate, read."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mc_core.arguments import check_arguments, check_method
from mc_core.config import MCConfig
from mc_core.segmentation import check_streams
from mc_torch.aggregate import read_all
from mc_torch.backends import Coefficients, Memory, Norm, Tokens, Weights, make_memory
from mc_torch.cache import Cache, Segments, in_dtype, in_room, sum_complete
from mc_torch.chunked import write_chunks
from mc_torch.gates import gate, pool_keys, spread
from mc_torch.grid import first_tokens
from mc_torch.inspection import InnerLoop, watch_writes
from mc_torch.layout import TensorPlan, make_plan
from mc_torch.numerics import Array, is_fixed, state_dtype, tree_map
from mc_torch.recurrent import run_tokens
from mc_torch.rows import add_row, drop_rows, map_rows
from mc_torch.streaming import extend_chunks


class Result(NamedTuple):
    """What `memory_caching` returns."""

    output: Array  # [b, t, h, v], in the dtype of v
    cache: Cache  # the stream's state after the last token
    gates: Array  # [b, t, h, n + 1]: cached segments, the online memory last; 0 where unread
    inner: InnerLoop | None = None  # what each write did; on request


def memory_caching(
    q: Array,
    k: Array,
    v: Array,
    u: Array | None,
    initial: Weights,
    coefficients: Coefficients,
    config: MCConfig,
    *,
    mask: Array | None = None,
    segment_lengths: Sequence[int] | None = None,
    norm: Norm = None,
    method: str = "chunked",
    inspect: bool = False,
) -> Result:
    """Write a sequence into its memory, cache it at segment ends, and read (arXiv:2602.24281).

    q, k and u are taken as given: the feature map is the memory's; projections, convolution and
    norms of q, k and the output are the layer's.

    Args:
        q: queries [b, t, h, k].
        k: keys [b, t, h, k].
        v: values [b, t, h, v].
        u: connectors [b, t, h, k]; None where the aggregation has no gates, or `use_q_as_u`.
        initial: W_0, first layer first, each [h, out, in]; a matrix memory has one, [h, v, k].
        coefficients: step, retention, momentum, previous, each [b, t, h] or None.
        config: the layer's configuration.
        mask: [b, t] bool, True = a real token; a masked one writes nothing and reads 0.
        segment_lengths: explicit lengths that cover t, instead of the configuration's.
            Where the configuration would cut elsewhere, the cache does not go on as a stream.
        norm: (gain, bias), each [h, v], where the memory has `norm="layer"`.
        method: `chunked`, the parallel form, or `recurrent`, token by token: the definition.
            Both give the same result.
        inspect: fill the result's `inner`, too; `chunked` alone.

    Raises:
        ValueError: a shape, a missing argument or a name that does not fit.
    """
    check_method(method, inspect)
    tensors = {"q": q, "k": k, "v": v, "u": u}
    check_arguments(tensors, initial, coefficients, config, norm, mask, is_fixed)
    b, t = q.shape[:2]
    plan = make_plan(t, config, segment_lengths, q.device)
    mask = torch.ones(b, t, dtype=torch.bool, device=q.device) if mask is None else mask
    if not b:
        # A reshape or a product of no rows may fail.
        rows = q, k, v, u, coefficients, mask
        q, k, v, u, coefficients, mask = tree_map(add_row, rows)
    tokens = _cleaned(q, k, v, u, coefficients, mask)
    memory = make_memory(config.memory, norm)
    inner = None
    if method == "recurrent":
        output, cache, gates = run_tokens(memory, config, tokens, initial, plan)
    else:
        output, cache, gates, inner = _run_chunks(memory, config, tokens, initial, plan, inspect)
    real = mask[:, :, None, None]
    output = torch.where(real, output, torch.zeros_like(output)).to(v.dtype)
    gates = torch.where(real, gates, torch.zeros_like(gates))
    result = Result(output, cache, gates, inner)
    return result if b else _drop_rows(result)


def extend(
    q: Array,
    k: Array,
    v: Array,
    u: Array | None,
    initial: Weights,
    coefficients: Coefficients,
    cache: Cache,
    *,
    config: MCConfig,
    mask: Array | None = None,
    count: Array | None = None,
    norm: Norm = None,
) -> Result:
    """Go on with a stream: any split of a sequence gives what the whole gives.

    Where positions would pass the cache's limit, the output is NaN: a compiled program cannot
    raise. `check_room` can, before it runs.

    Args:
        q: as `memory_caching` takes it, like k, v, u, initial, coefficients, mask and norm.
        k: as above.
        v: as above.
        u: as above.
        initial: as above.
        coefficients: as above.
        cache: the stream so far.
        config: the layer's configuration, with segments of constant size.
        mask: as above.
        count: tokens of each row, its first ones, int32 [b]; the others do not exist: they take
            no position, and their output is 0. None = all.
        norm: as above.

    Raises:
        ValueError: a shape, a missing argument or a name that does not fit.
    """
    check_streams(config)
    tensors = {"q": q, "k": k, "v": v, "u": u}
    check_arguments(tensors, initial, coefficients, config, norm, mask, is_fixed)
    b, t = q.shape[:2]
    if cache.position.shape != (b,):
        raise ValueError(f"cache has {cache.position.shape[0]} rows: must be {b}, as q")
    exists = torch.ones(b, t, dtype=torch.bool, device=q.device)
    if count is not None:
        exists = first_tokens(count, t)
    mask = exists if mask is None else mask & exists
    if not b:
        rows = q, k, v, u, coefficients, mask, exists
        q, k, v, u, coefficients, mask, exists = tree_map(add_row, rows)
        cache = map_rows(add_row, cache)
    count = torch.sum(exists, dim=1, dtype=torch.int32)
    tokens = _cleaned(q, k, v, u, coefficients, mask)
    cache = in_dtype(cache, state_dtype(q.dtype))
    memory = make_memory(config.memory, norm)
    output, new, gates = extend_chunks(memory, config, tokens, initial, count, cache)
    real = mask[:, :, None, None]
    output = torch.where(real, output, torch.zeros_like(output)).to(v.dtype)
    result = Result(in_room(output, new), new, torch.where(real, gates, torch.zeros_like(gates)))
    return result if b else _drop_rows(result)


def _drop_rows(result: Result) -> Result:
    """Return the result of no rows, from that of one."""
    output, cache, gates, inner = result
    output, gates, inner = tree_map(drop_rows, (output, gates, inner))
    return Result(output, map_rows(drop_rows, cache), gates, inner)


def _run_chunks(
    memory: Memory,
    config: MCConfig,
    tokens: Tokens,
    initial: Weights,
    plan: TensorPlan,
    inspect: bool,
) -> tuple[Array, Cache, Array, InnerLoop | None]:
    q, k, v, u, coefficients, mask = tokens
    # A soup mixes layer by layer with memories that the write has yet to make.
    later = inspect or (config.mixes_layers and plan.segments > 1)
    queries = q if config.memory.gradient_uses_weights and not later else None
    writes = write_chunks(memory, k, v, initial, coefficients, mask, plan, q=queries)
    pools = pool_keys(k, mask, plan, config.pooling)
    segment = torch.tensor(plan.segment_of, device=q.device)
    weights, selected = gate(u, pools.segment, pools.running, segment, config)
    output = read_all(memory, config, writes, q, weights, selected, plan)
    gates = spread(weights, selected, plan.segments)
    length = pools.length[:, -1]
    cache = Cache(
        stored=Segments(writes.ends, pools.segment, pools.length),
        total=sum_complete(config, writes.ends, plan),
        state=writes.final,
        pool_sum=pools.total[:, -1],
        pool=pools.segment[:, -1],
        length=length,
        slot=torch.full_like(length, plan.segments - 1),
        position=torch.full_like(length, plan.tokens),
        limit=torch.full((), plan.limit, dtype=torch.int32, device=q.device),
    )
    inner = None
    if inspect:
        assert writes.online is not None
        inner = watch_writes(memory, writes.online, k, v, coefficients, mask, plan)
    return output, cache, gates, inner


def _cleaned(
    q: Array, k: Array, v: Array, u: Array | None, coefficients: Coefficients, mask: Array
) -> Tokens:
    # Whatever stands at a masked token, NaN included, must not reach a product.
    real = mask[:, :, None, None]
    q, k, v = (torch.where(real, x, torch.zeros_like(x)) for x in (q, k, v))
    u = q if u is None else torch.where(real, u, torch.zeros_like(u))
    dtype = state_dtype(q.dtype)
    coefficients = tree_map(
        lambda x: torch.where(mask[:, :, None], x.to(dtype), torch.ones_like(x, dtype=dtype)),
        coefficients,
    )
    return Tokens(q, k, v, u, coefficients, mask)
