"""Detached cached memories and pooled keys in streams.

In restart mode, keys and values of a segment affect the next one only through its cached memory and
its pooled key.
"""

import jax
import numpy as np
import pytest
import torch

import mc_jax
import mc_torch
from helpers import jax_calls, torch_calls
from helpers.cases import make_case

pytestmark = pytest.mark.usefixtures("float64", "strict")

SEGMENT = 4
PAIRS = [("linear", "residual"), ("linear", "ssc")]


def key_and_value_gradients(package, case):
    """Return the gradients of k and v from outputs of the second segment of a stream."""
    calls = jax_calls if package is mc_jax else torch_calls
    inputs = calls.arrays(case)

    def loss(k, v):
        cache = package.init_cache(inputs["initial"], case.config, 2, case.tokens)
        arguments = inputs | {"k": k, "v": v}
        output = package.extend(**arguments, cache=cache, config=case.config).output
        return (output[:, SEGMENT:] ** 2).sum()

    if package is mc_jax:
        return jax.jit(jax.grad(loss, (0, 1)))(inputs["k"], inputs["v"])
    return torch.autograd.grad(loss(inputs["k"], inputs["v"]), (inputs["k"], inputs["v"]))


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("package", [mc_jax, mc_torch], ids=["jax", "torch"])
def test_stream_gradients_do_not_reach_detached_segments(package, pair):
    case = make_case(*pair, tokens=2 * SEGMENT, segment_size=SEGMENT, state_init_mode="restart")
    case = case.with_config(detach_cached_states=True, detach_cached_context=True)
    for gradient in map(np.asarray, key_and_value_gradients(package, case)):
        assert not gradient[:, :SEGMENT].any()
        assert gradient[:, SEGMENT:].any()
