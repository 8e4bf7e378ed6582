"""Run a case with `mc_jax`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_core.segmentation import make_plan
from mc_core.tree_utils import flatten
from mc_core.weights import check_leaves, leaves
from mc_jax import (
    Coefficients,
    LanguageModel,
    MemoryCachingLayer,
    extend,
    generate,
    init_cache,
    memory_caching,
)
from mc_jax.inspection import make_trace
from parity.cases import Array, Case, FunctionInputs, Inputs, rounded, state_dtype
from parity.leaves import GRADIENT, Forward, Leaf, Leaves, cotangent
from parity.weights import Flat, jax_weights

# Mean biases of learned coefficients: small steps, high retention.
_BIASES = {"step": -2.0, "newest": 0.0, "previous": 0.0, "momentum": 1.0, "retention": 2.0}


def parameters(case: Case) -> Flat:
    """Return the parameters of a case's module, float64, with JAX names; empty for functions.

    Random parameters replace the zeros and ones of the initialization, which may hide faults.
    """
    if case.level == "function":
        return {}
    if not case.drawn:
        return rounded(jax_weights(build(case, "float32")), state_dtype(case.dtype))
    rng = np.random.default_rng([case.seed, 1])
    shapes = {name: x.shape for name, x in _named(abstract(case, case.dtype)[1]).items()}
    drawn = {name: _draw(name, rng.standard_normal(shape)) for name, shape in shapes.items()}
    return rounded(drawn, state_dtype(case.dtype))


def build(case: Case, dtype: str) -> Any:
    """Build a case's layer or model, with compute in `dtype`."""
    kind = LanguageModel if case.level == "model" else MemoryCachingLayer
    compute, param = jnp.dtype(dtype), jnp.dtype(state_dtype(dtype))
    return kind(case.config, rngs=nnx.Rngs(case.seed), dtype=compute, param_dtype=param)  # type: ignore[arg-type]


def abstract(case: Case, dtype: str) -> tuple[Any, Any]:
    """Return the graph definition and the parameter shapes of a case's module."""
    with jax.enable_x64(True):
        module = nnx.eval_shape(lambda: build(case, dtype))
    graphdef, params = nnx.split(module)
    return graphdef, nnx.to_pure_dict(params)


def filled(shapes: Any, weights: Flat) -> Any:
    """Return parameters as a pytree with the structure and dtypes of `shapes`.

    Raises:
        ValueError: parameters are missing, unexpected or of another shape; lists all of them.
    """
    wanted = _named(shapes)
    dtypes = {name: wanted[name].dtype for name in wanted}
    flat = {name: x.astype(dtypes.get(name, x.dtype)) for name, x in weights.items()}
    check_leaves(leaves(flat), leaves(wanted))
    return jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(flat[_name(path)]), shapes)


def _draw(name: str, normal: Array) -> Array:
    *_, owner, field = ("", *name.split("."))
    if field == "bias" and owner in _BIASES:
        return _BIASES[owner] + 0.5 * normal
    if field in ("scale", "level_scale"):
        return 1 + 0.2 * normal
    if field in ("bias", "embedding", "gate_bias", "gate_temperature"):
        return 0.5 * normal
    if owner.endswith("_conv"):  # [width, d]
        return normal * normal.shape[0] ** -0.5
    fan_in = normal.shape[0] if field == "kernel" else normal.shape[-1]
    return normal * fan_in**-0.5


def _named(params: Any) -> dict[str, Any]:
    return {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def run(
    case: Case, inputs: Inputs, weights: Flat, dtype: str | None = None, device: str = "cpu"
) -> Leaves:
    """Run a case forward and backward, or generate `new_tokens`.

    Args:
        case: case to run.
        inputs: result of `draw`.
        weights: result of `parameters`.
        dtype: compute dtype; None = the case's.
        device: `cpu` or `cuda`.
    """
    dtype = dtype or case.dtype
    with jax.enable_x64(True), jax.default_device(jax.devices(device)[0]):
        given = _variables(inputs, dtype)
        graphdef, params = None, {}
        if case.level != "function":
            graphdef, shapes = abstract(case, dtype)
            params = filled(shapes, weights)
        if graphdef is not None and case.new_tokens:
            new = generate(nnx.merge(graphdef, params), inputs.prompts, case.new_tokens)
            return {"new_tokens": _leaf(jnp.stack(list(new)))}

        def forward(given: Any, params: Any) -> Forward:
            module = None if graphdef is None else nnx.merge(graphdef, params)
            return _forward(case, given, inputs, module)

        @jax.jit
        def program(given: Any, params: Any) -> Any:
            result, pull = jax.vjp(forward, given, params)
            cotangents = [_cotangent(name, leaf, case.seed) for name, leaf in flatten(result)]
            return result, pull(jax.tree.unflatten(jax.tree.structure(result), cotangents))

        result, gradients = program(given, params)
    named = {name: _leaf(x) for name, x in flatten(result)}
    for part in gradients:
        named |= {name: _leaf(x) for name, x in flatten(part, GRADIENT)}
    found, wanted = named["output"].dtype, state_dtype(dtype) if case.level == "model" else dtype
    assert found == wanted, f"computed in {found}, not {wanted}"
    return named


def _variables(inputs: Inputs, dtype: str) -> Any:
    given, wide = inputs.differentiable, jnp.dtype(state_dtype(dtype))
    to = lambda tree, kind: jax.tree.map(lambda x: jnp.asarray(x, kind), tree)  # noqa: E731
    if isinstance(given, FunctionInputs):
        tokens = to(given[:4], jnp.dtype(dtype))
        return FunctionInputs(*tokens, *to(given[4:], wide))
    return to(given, jnp.dtype(dtype))


def _forward(case: Case, given: Any, inputs: Inputs, module: Any) -> Forward:
    if case.splits:
        return _stream(case, given, inputs, module)
    mask = None if inputs.mask is None else jnp.asarray(inputs.mask)
    if isinstance(given, FunctionInputs):
        result = memory_caching(
            *given[:5],
            Coefficients(**given.coefficients),
            case.layer,
            mask=mask,
            segment_lengths=case.lengths,
            norm=given.norm,
            gate_bias=given.gate_bias,
            method=case.method,
        )
        return Forward(result.cache, None, result.gates, result.output)
    if case.level == "model":
        tokens = jnp.asarray(inputs.tokens, jnp.int32)
        trace = module.inspect(tokens, mask)[1]
        return Forward(None, jax.lax.stop_gradient(trace), None, module(tokens, mask))
    # `forward_with_cache` and `inspect` in one program, to halve the compile time.
    output, result = module._run(given["x"], mask, case.lengths, inspect=True)
    plan = make_plan(case.tokens, case.layer, case.lengths)
    trace = make_trace(result.gates, result.cache.segments, result.inner, plan)
    return Forward(result.cache, trace, result.gates, output)


def _stream(case: Case, given: Any, inputs: Inputs, module: Any) -> Forward:
    outputs, gates = [], []
    if isinstance(given, FunctionInputs):
        cache = init_cache(given.initial, case.layer, case.batch, case.tokens)
    else:
        cache = module.init_cache(case.batch, case.tokens)
        tokens = jnp.asarray(inputs.tokens, jnp.int32) if case.level == "model" else given["x"]
    for here in case.calls:
        mask = None if inputs.mask is None else jnp.asarray(inputs.mask[:, here])
        if isinstance(given, FunctionInputs):
            part = given.at(here)
            at = Coefficients(**part.coefficients)
            result = extend(
                *part[:5],
                at,
                cache,
                config=case.layer,
                mask=mask,
                norm=part.norm,
                gate_bias=part.gate_bias,
            )
            output, cache = result.output, result.cache
            gates.append(result.gates)
        else:
            padding = None if inputs.padding is None else jnp.asarray(inputs.padding[:, here])
            output, cache = module.extend(tokens[:, here], cache, mask, padding=padding)
        outputs.append(output)
    joined = jnp.concatenate(gates, axis=1) if gates else None
    return Forward(cache, None, joined, jnp.concatenate(outputs, axis=1))


def _cotangent(name: str, leaf: jax.Array, seed: int) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return np.zeros(leaf.shape, jax.dtypes.float0)
    return jnp.asarray(cotangent(name, leaf.shape, seed), leaf.dtype)


def _leaf(x: jax.Array) -> Leaf:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    value: Array = np.asarray(x).astype(np.float64) if floating else np.asarray(x)
    return Leaf(value, str(x.dtype))
