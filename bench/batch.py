"""Random inputs of all benchmarks."""

import numpy as np


def batch(width: int, rows: int, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and a cotangent, float32 [rows, tokens, width], unit normal."""
    rng = np.random.default_rng(seed)
    shape = (rows, tokens, width)
    return rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)
