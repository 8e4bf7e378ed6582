"""Widths of prompt blocks."""

import pytest

from mc_core.generation import bucket, make_blocks


@pytest.mark.parametrize("tokens", range(1, 41))
def test_last_prompt_block_has_power_of_two_width(tokens):
    widths = [block.tokens.shape[1] for block in make_blocks([range(tokens)], 8)]
    rest = tokens - sum(widths[:-1])
    assert widths[:-1] == [8] * (len(widths) - 1)
    assert widths[-1] in (1, 2, 4, 8)
    assert widths[-1] // 2 < rest <= widths[-1]


def test_capacity_buckets():
    assert [bucket(n, 8) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17)] == [1, 2, 4, 4, 8, 8, 16, 16, 24]
