"""Run a case with `mc_torch`."""

from contextlib import nullcontext
from typing import Any

import torch

from mc_core.tree_utils import flatten
from mc_torch import (
    Coefficients,
    LanguageModel,
    MemoryCachingLayer,
    extend,
    generate,
    init_cache,
    memory_caching,
)
from mc_torch.chunk_layout import make_plan
from mc_torch.inspection import make_trace
from mc_torch.numerics import tree_map
from parity.cases import Case, FunctionInputs, Inputs, state_dtype
from parity.leaves import GRADIENT, Forward, Leaf, Leaves, cotangent
from parity.weights import Flat, load_torch, to_jax, to_torch


def build(case: Case, dtype: str, device: str) -> Any:
    """Build a case's layer or model, with parameters in the dtype for compute in `dtype`."""
    kind = LanguageModel if case.level == "model" else MemoryCachingLayer
    return kind(case.config, device=device, dtype=getattr(torch, state_dtype(dtype)))  # type: ignore[arg-type]


def run(
    case: Case, inputs: Inputs, weights: Flat, dtype: str | None = None, device: str = "cpu"
) -> Leaves:
    """Run a case forward and backward, or generate `new_tokens`.

    Args:
        case: case to run.
        inputs: result of `draw`.
        weights: result of `run_jax.parameters`.
        dtype: compute dtype; None = the case's.
        device: `cpu` or `cuda`.
    """
    dtype = dtype or case.dtype
    given = _variables(inputs, dtype, device)
    module, params = None, {}
    if case.level != "function":
        module = build(case, dtype, device)
        wide = state_dtype(dtype)
        load_torch(module, {name: x.astype(wide) for name, x in to_torch(weights).items()})
        params = dict(module.named_parameters())
    if module is not None and case.new_tokens:
        new = generate(module, inputs.prompts, case.new_tokens)
        return {"new_tokens": _leaf(torch.stack(list(new)).int())}  # ids are int64 in PyTorch
    # A layer computes in the dtype of its input; a model, which reads ids, in that of autocast.
    casts = dtype == "bfloat16" and case.level == "model"
    with torch.autocast(device, torch.bfloat16) if casts else nullcontext():
        result = _forward(case, given, inputs, module, device)
    named = {name: _leaf(x) for name, x in flatten(result)}

    followed = {name: x for name, x in flatten(result) if x.requires_grad}
    cotangents = [
        torch.tensor(cotangent(name, x.shape, case.seed), dtype=x.dtype, device=device)
        for name, x in followed.items()
    ]
    variables = dict(flatten(given)) | params
    gradients = torch.autograd.grad(
        list(followed.values()), list(variables.values()), cotangents, materialize_grads=True
    )
    for name, gradient in zip(variables, gradients, strict=True):
        leaf = _leaf(gradient)
        if name in params:
            ((name, value),) = to_jax({name: leaf.value}).items()
            leaf = leaf._replace(value=value)
        named[f"{GRADIENT}.{name}"] = leaf
    return named


def _variables(inputs: Inputs, dtype: str, device: str) -> Any:
    def to(tree: Any, kind: str) -> Any:
        if isinstance(tree, dict):
            return {name: to(x, kind) for name, x in tree.items()}
        return tree_map(
            lambda x: torch.tensor(
                x, dtype=getattr(torch, kind), device=device, requires_grad=True
            ),
            tree,
        )

    given, wide = inputs.differentiable, state_dtype(dtype)
    if isinstance(given, FunctionInputs):
        tokens = to(given[:4], dtype)
        return FunctionInputs(*tokens, *(to(x, wide) for x in given[4:]))
    return to(given, dtype)


def _forward(case: Case, given: Any, inputs: Inputs, module: Any, device: str) -> Forward:
    if case.splits:
        return _stream(case, given, inputs, module, device)
    mask = None if inputs.mask is None else torch.tensor(inputs.mask, device=device)
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
        tokens = torch.tensor(inputs.tokens, device=device)
        with torch.no_grad():
            trace = module.inspect(tokens, mask)[1]
        return Forward(None, trace, None, module(tokens, mask))
    output, result = module._run(given["x"], mask, case.lengths, inspect=True)
    plan = make_plan(case.tokens, case.layer, case.lengths, torch.device(device))
    trace = make_trace(result.gates, result.cache.segments, result.inner, plan)
    return Forward(result.cache, trace, result.gates, output)


def _stream(case: Case, given: Any, inputs: Inputs, module: Any, device: str) -> Forward:
    outputs, gates = [], []
    if isinstance(given, FunctionInputs):
        cache = init_cache(given.initial, case.layer, case.batch, case.tokens)
    else:
        cache = module.init_cache(case.batch, case.tokens)
        model = case.level == "model"
        tokens = torch.tensor(inputs.tokens, device=device) if model else given["x"]
    for here in case.calls:
        mask = None if inputs.mask is None else torch.tensor(inputs.mask[:, here], device=device)
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
            pad = None if inputs.padding is None else inputs.padding[:, here]
            padding = None if pad is None else torch.tensor(pad, device=device)
            output, cache = module.extend(tokens[:, here], cache, mask, padding=padding)
        outputs.append(output)
    joined = torch.cat(gates, dim=1) if gates else None
    return Forward(cache, None, joined, torch.cat(outputs, dim=1))


def _leaf(x: torch.Tensor) -> Leaf:
    name = str(x.dtype).removeprefix("torch.")
    x = x.detach().cpu()
    return Leaf((x.double() if x.is_floating_point() else x).numpy(), name)
