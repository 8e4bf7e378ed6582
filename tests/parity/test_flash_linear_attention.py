"""The gated delta rule and log-linear attention, compared with flash-linear-attention on a CPU.

Its naive forms compute in float32. `make bench-peers` installs the package.
"""

import warnings

import numpy as np
import pytest
import torch

import mc_torch
from mc_core import DeltaConfig, MCConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # without a GPU, its import warns
    pytest.importorskip("fla", reason="flash-linear-attention: make bench-peers")
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.log_linear_attn.naive import naive_log_linear_attn

B, H, K = 2, 2, 8
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def draw(rng, *shape):
    return torch.from_numpy(rng.standard_normal((B, *shape)).astype(np.float32)).requires_grad_()


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def compare(ours, theirs, inputs):
    """Compare outputs, and gradients with random cotangents."""
    torch.testing.assert_close(ours, theirs, **CLOSE)
    cotangent = torch.from_numpy(np.random.default_rng(1).standard_normal(ours.shape)).float()
    left = torch.autograd.grad(ours, inputs, cotangent, retain_graph=True)
    right = torch.autograd.grad(theirs, inputs, cotangent)
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("tokens", [1, 13, 37])
@pytest.mark.parametrize("method", ["recurrent", "chunked"])
def test_delta_matches_gated_delta_rule(tokens, method):
    rng = np.random.default_rng(tokens)
    q, k, v = (draw(rng, tokens, H, K) for _ in range(3))
    step, retention = (draw(rng, tokens, H) for _ in range(2))
    initial = torch.from_numpy(rng.standard_normal((H, K, K)).astype(np.float32)).requires_grad_()
    alpha, beta = torch.sigmoid(retention + 2), torch.sigmoid(step)
    config = MCConfig(H * K, H, memory=DeltaConfig(), aggregation="none", chunk_size=5)
    ours = mc_torch.memory_caching(
        unit(q), unit(k), v, None, (initial,), mc_torch.Coefficients(beta, alpha), config,
        method=method,
    )  # fmt: skip
    theirs, state = naive_recurrent_gated_delta_rule(
        unit(q), unit(k), v, beta, alpha.log(), 1.0, initial.mT.expand(B, H, K, K), True
    )
    compare(ours.output, theirs, (q, k, v, step, retention, initial))
    torch.testing.assert_close(ours.cache.state.weights[0], state.mT, **CLOSE)


@pytest.mark.parametrize("tokens", [2, 13, 32])
@pytest.mark.parametrize("method", ["dense", "recurrent", "chunked"])
def test_log_linear_attention_matches(tokens, method):
    rng = np.random.default_rng(tokens)
    q, k, v = (draw(rng, tokens, H, K) for _ in range(3))
    weights, retention = draw(rng, tokens, H, 7), draw(rng, tokens, H)
    levels, alpha = torch.nn.functional.softplus(weights), torch.sigmoid(retention + 2)
    ours = mc_torch.log_linear_attention(q, k, v, levels, alpha, method=method, chunk_size=4)
    theirs = naive_log_linear_attn(q, k, v, alpha.log(), levels)
    compare(ours, theirs, (q, k, v, weights, retention))
