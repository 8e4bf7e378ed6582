"""Results of a sweep on text."""

from pathlib import Path

from train.sweeps.sweep_config import SweepConfig


def result(row: str, seed: int, *bits: float, cacheless: bool = False, **keys: object) -> dict:
    """A result with two buckets of equal size and the given bits."""
    buckets = [
        {"start": start, "end": end, "tokens": 100, "bits": value}
        for start, end, value in zip((0, 16), (16, 32), bits, strict=True)
    ]
    return {
        "row": row, "overrides": {"kind": row}, "rate": 0.1, "seed": seed, "task": "text",
        "model": row, "cacheless": cacheless, "state_tokens": 32, "state_bytes": 100,
        "flops_per_token": 1000.0, "parameters": 7, "seconds": 2.0, "unit": "byte",
        "bits_per_byte": sum(bits) / 2, "validation_sha256": "x", "positions": buckets,
    } | keys  # fmt: skip


CONFIG = SweepConfig(Path("x"), "y", seeds=(0, 1))
