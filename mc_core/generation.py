"""Options of generation, and division of prompts into padded blocks."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mc_core.checks import check_ids, check_integer, check_integers

PROMPT_BLOCK = 512  # maximum number of prompt tokens per call
SEEDS = 2**32


class PromptBlock(NamedTuple):
    """Next tokens of all prompts, right-padded."""

    tokens: Any  # ids, int32 [b, w]; 0 at padding
    padding: Any  # bool [b, w], True at padding


def check_sampling(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> None:
    """Check the options of sampling.

    Raises:
        ValueError: an option is invalid; the message states its value and the allowed values.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature = {temperature}: must be finite and >= 0; 0 is greedy")
    if top_k is not None:
        check_integer("top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: must be in (0, 1]")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p = {min_p}: must be in [0, 1]")
    if not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
        raise ValueError(
            f"repetition_penalty = {repetition_penalty}: must be finite and > 0; 1 is none"
        )


def check_generation(
    prompts: Sequence[Sequence[int] | np.ndarray],
    vocab_size: int,
    max_new_tokens: int,
    seed: int,
    rows: Sequence[int],
    block: int,
) -> None:
    """Check the arguments of `generate`.

    Raises:
        ValueError: an argument is invalid; the message states its value and the allowed values.
    """
    check_integer("max_new_tokens", max_new_tokens, 1)
    check_integer("block", block, 1)
    check_integer("seed", seed, 0, SEEDS - 1)
    if len(rows) != len(prompts):
        raise ValueError(f"rows has {len(rows)} elements: must have {len(prompts)}, one per prompt")
    for i, row in enumerate(rows):
        check_integer(f"rows[{i}]", row, 0, SEEDS - 1)
    check_prompts(prompts, vocab_size)


def check_prompts(prompts: Sequence[Sequence[int] | np.ndarray], vocab_size: int) -> None:
    """Check the ids of prompts.

    Raises:
        ValueError: a prompt has no ids, or an id is invalid; the message states its position.
    """
    for i, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or not ids.size:
            raise ValueError(f"prompts[{i}] has shape {ids.shape}: must be [t], t >= 1")
        check_integers(f"prompts[{i}]", ids.dtype.name)
        check_ids(f"prompts[{i}]", ids, vocab_size)


def make_blocks(
    prompts: Sequence[Sequence[int] | np.ndarray], block: int = PROMPT_BLOCK
) -> list[PromptBlock]:
    """Split prompts into padded blocks; a small set of widths limits recompilation.

    Args:
        prompts: ids of each row, at least one.
        block: width of all blocks but the last, whose width is rounded up to a power of two.
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
    starts = range(0, width, block)
    return [PromptBlock(tokens[:, i : i + block], padding[:, i : i + block]) for i in starts]


def mark_prompt_ids(prompts: Sequence[Sequence[int] | np.ndarray], vocab_size: int) -> np.ndarray:
    """Return the ids that occur in each prompt, bool [b, vocab_size]."""
    seen = np.zeros((len(prompts), vocab_size), bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[np.asarray(prompt)] = True
    return seen


def bucket(tokens: int, block: int = PROMPT_BLOCK) -> int:
    """Round up to a power of two, or above `block` to a multiple of `block`."""
    if tokens > block:
        return -(-tokens // block) * block
    return min(block, 1 << (tokens - 1).bit_length())
