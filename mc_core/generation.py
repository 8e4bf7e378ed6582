"""What generation is in both frameworks: its options, and prompts in blocks of few shapes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mc_core.checks import check_ids, check_integer, check_integers

PROMPT_BLOCK = 512  # tokens of a prompt that are read at once
SEEDS = 2**32


class Block(NamedTuple):
    """The next tokens of every prompt, on the left of their rows."""

    tokens: Any  # ids, int32 [b, w]; 0 where a row has none
    padding: Any  # bool [b, w], True where a row has none


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Hold the options of sampling to their ranges.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature = {temperature}: must be finite and >= 0; 0 is greedy")
    if top_k is not None:
        check_integer("top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: must be in (0, 1]")


def check_generation(
    prompts: Sequence[Sequence[int] | np.ndarray],
    vocab_size: int,
    max_new_tokens: int,
    seed: int,
    rows: Sequence[int],
    block: int,
) -> None:
    """Hold what `generate` is given to what it can do.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    check_integer("max_new_tokens", max_new_tokens, 1)
    check_integer("block", block, 1)
    check_integer("seed", seed, 0, SEEDS - 1)
    if len(rows) != len(prompts):
        raise ValueError(f"rows: {len(rows)} numbers for {len(prompts)} prompts: must be one each")
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        check_integer(f"rows[{i}]", row, 0, SEEDS - 1)
        ids = np.asarray(prompt)
        if ids.ndim != 1 or not ids.size:
            raise ValueError(f"prompts[{i}] has shape {ids.shape}: must be [t], t >= 1")
        check_integers(f"prompts[{i}]", ids.dtype.name)
        check_ids(f"prompts[{i}]", ids, vocab_size)


def make_blocks(
    prompts: Sequence[Sequence[int] | np.ndarray], block: int = PROMPT_BLOCK
) -> list[Block]:
    """Cut prompts of any lengths into blocks whose widths are few.

    Args:
        prompts: ids of each row, at least one.
        block: the widest block; the last one is as wide as the next power of two.
    """
    longest = max(map(len, prompts))
    width = (longest - 1) // block * block
    width += bucket(longest - width, block)
    tokens, padding = (
        np.zeros((len(prompts), width), np.int32),
        np.ones((len(prompts), width), bool),
    )
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], padding[row, : len(prompt)] = prompt, False
    cuts = range(0, width, block)
    return [Block(tokens[:, at : at + block], padding[:, at : at + block]) for at in cuts]


def bucket(tokens: int, block: int = PROMPT_BLOCK) -> int:
    """Return the next power of two; from `block` on its next multiple."""
    if tokens > block:
        return -(-tokens // block) * block
    return min(block, 1 << (tokens - 1).bit_length())
