"""Configuration and levels of log-linear attention."""

import dataclasses

import numpy as np
import pytest

from helpers.oracle_log_linear import buckets
from mc_core import LogLinearConfig, MCConfig, ModelConfig
from mc_core.log_linear import level_count, level_slices, mean_reads, pair_levels


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 37, 64])
def test_levels_match_buckets(tokens):
    """The XOR form, the slices of the last token, and the definition agree (section 7)."""
    levels = pair_levels(tokens)
    for token in range(tokens):
        assert {s: levels[token, s] for s in range(token + 1)} == buckets(token)
    np.testing.assert_array_equal(levels, levels.T)
    assert levels.max() + 1 == level_count(tokens)
    last = {s: level for level, where in level_slices(tokens) for s in range(tokens)[where]}
    assert last == buckets(tokens - 1)


def test_level_counts():
    assert [level_count(n) for n in (1, 2, 3, 4, 5, 16384, 16385)] == [1, 2, 3, 3, 4, 15, 16]
    assert LogLinearConfig(8, 2).max_tokens == 32768
    assert level_count(32768) == 16
    assert mean_reads(1) == 0
    assert mean_reads(8) == 12 / 8


def test_configuration_is_checked_and_round_trips():
    for options in ({}, {"num_levels": 5, "retention": "head", "conv_width": 3}):
        config = LogLinearConfig(8, 2, **options)
        assert LogLinearConfig.from_dict(config.to_dict()) == config
    for options, message in (
        ({"retention": "none"}, "retention = 'none': must be one of 'token', 'head', 'constant'"),
        ({"chunk_size": 48}, "chunk_size = 48: must be a power of two"),
        ({"num_levels": 32}, r"num_levels = 32: must be in \[1, 31\]"),
        ({"num_heads": 3}, "d_model = 8: must be a multiple of num_heads = 3"),
        ({"qk_norm": "rms"}, "qk_norm = 'rms': must be one of 'l2', 'none'"),
        ({"output_norm": "l2"}, "output_norm = 'l2': must be one of 'rms', 'none'"),
    ):
        with pytest.raises(ValueError, match=f"LogLinearConfig.{message}"):
            dataclasses.replace(LogLinearConfig(8, 2), **options)
    layer = MCConfig(8, 2, chunk_size=6, conv_width=3, output_norm="none")
    model = ModelConfig(11, 2, layer, mixers=("log_linear", "memory"), num_levels=9)
    mixer = LogLinearConfig(8, 2, 9, chunk_size=4, conv_width=3, output_norm="none")
    assert model.block_layers == (mixer, layer)
    with pytest.raises(ValueError, match=r"ModelConfig.num_levels = 0: must be in \[1, 31\]"):
        dataclasses.replace(model, num_levels=0)
