"""The oracle's MLP memory matches hand computations and finite differences."""

import numpy as np
import pytest

from helpers.oracle_cases import close, make_case
from helpers.oracle_mlp import clipped, gelu, inner_gradient, inner_loss, mlp
from mc_core import DLAConfig


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("objective", ["dot", "l2"])
@pytest.mark.parametrize(("residual", "norm"), [(True, "none"), (False, "none"), (False, "layer")])
def test_inner_gradient_matches_finite_differences(depth, objective, residual, norm):
    memory = DLAConfig(depth, 2, residual, norm, objective, inner_clip=None)
    case = make_case(memory)
    weights, k, v = [w[0].copy() for w in case.initial], case.k[0, 0, 0], case.v[0, 0, 0]
    gain_bias = None if case.norm is None else tuple(x[0] for x in case.norm)
    pairs = inner_gradient(weights, k, v, memory, gain_bias)
    for weight, (delta, activation) in zip(weights, pairs, strict=True):
        for at in np.ndindex(weight.shape):
            kept, losses = weight[at], []
            for shift in (1e-5, -1e-5):
                weight[at] = kept + shift
                losses.append(inner_loss(weights, k, v, memory, gain_bias))
            weight[at] = kept
            close(delta[at[0]] * activation[at[1]], (losses[0] - losses[1]) / 2e-5, 1e-8)
        assert np.abs(np.outer(delta, activation)).max() > 1e-3


def test_mlp_read_matches_hand_computation():
    x = np.array([1.0, -2.0])
    hidden = gelu(x)
    close(hidden, [0.8413447460685429, -0.04550026389635842])  # Φ(1) and -2 Φ(-2)
    eye, swap = np.eye(2), np.array([[0.0, 1.0], [2.0, 0.0]])
    inner = np.array([hidden[1], 2.0 * hidden[0]])
    close(mlp((eye, swap), x, DLAConfig(residual=False))[0], inner)
    close(mlp((eye, swap), x, DLAConfig())[0], inner + x)
    close(mlp((swap,), x, DLAConfig(depth=1))[0], [-2.0 + 1.0, 2.0 - 2.0])
    gain, bias = np.array([3.0, 0.5]), np.array([0.1, 0.2])
    unit = np.array([-2.0, 2.0]) / np.sqrt(4.0 + 1e-6)  # swap @ x has mean 0
    for residual in (True, False):
        memory = DLAConfig(depth=1, norm="layer", residual=residual)
        close(mlp((swap,), x, memory, (gain, bias))[0], x + unit * gain + bias)


def test_inner_clip_bounds_gradient_norm():
    rng = np.random.default_rng(0)
    for scale in (1e-3, 0.1, 1.0, 100.0):
        delta, activation = scale * rng.standard_normal(5), rng.standard_normal(3)
        plain = np.outer(delta, activation)
        close(clipped(delta, activation, None), plain)
        size, cut = np.linalg.norm(plain), clipped(delta, activation, 0.7)
        assert np.linalg.norm(cut) <= 0.7 * (1 + 1e-15)
        close(cut, plain * min(1.0, 0.7 / size), 1e-9)
    assert not clipped(np.zeros(5), np.ones(3), 0.7).any()
