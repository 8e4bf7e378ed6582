"""Time between the training steps of a tiny run on a CPU, from a trace of `jax.profiler`.

python -m tools.step_gaps

The gap is the time from the end of a step's execution on the device to the start of the next one's:
the time in which the device waits for the host.
"""

import io
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

import jax
from rich.console import Console

from train.config import TrainConfig, from_dict
from train.loop import train

STEPS, LOG_EVERY, SAVE_EVERY = 200, 10, 50
PROGRAM = "jit_step"
Interval = tuple[float, float]  # start and end, in nanoseconds


def tiny_run(corpus: str, directory: str) -> TrainConfig:
    """Return a run whose steps take about a millisecond."""
    layer = {
        "d_model": 16,
        "num_heads": 2,
        "memory": {"kind": "linear"},
        "segment_size": 16,
        "chunk_size": 16,
    }
    return from_dict(
        {
            "data": {"corpus": corpus, "window": 32},
            "model": {"vocab_size": 256, "num_layers": 1, "ffn_width": 32, "layer": layer},
            "run": {
                "steps": STEPS,
                "batch_size": 2,
                "log_every": LOG_EVERY,
                "save_every": SAVE_EVERY,
                "sample_tokens": 0,
                "directory": directory,
            },
        }
    )


def executions(trace: Path) -> list[Interval]:
    """Return the executions of the training step on the device, in order."""
    (file,) = trace.glob("plugins/profile/*/*.xplane.pb")
    found: dict[object, Interval] = {}
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if stats.get("hlo_module") == PROGRAM:
                    start, end = found.get(stats["run_id"], (event.start_ns, event.end_ns))
                    found[stats["run_id"]] = min(start, event.start_ns), max(end, event.end_ns)
    return sorted(found.values())


def main() -> None:
    """Train, and print the gaps."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text").mkdir()
        for number in range(20):
            words = " ".join(f"word{number * i % 97}" for i in range(1000))
            (Path(folder) / "text" / f"{number}.txt").write_text(words)
        config = tiny_run(f"{folder}/text", f"{folder}/run")
        with jax.profiler.trace(folder, profiler_options=options):
            train(config, Console(file=io.StringIO()))
        steps = executions(Path(folder))[1:]  # without the one that compiles
    durations = [(end - start) / 1e6 for start, end in steps]
    between = [(after[0] - before[1]) / 1e6 for before, after in pairwise(steps)]
    print(
        f"{len(steps)} steps of {statistics.median(durations):.2f} ms (median); between them "
        f"{statistics.median(between):.3f} ms (median), {statistics.mean(between):.3f} ms (mean), "
        f"{max(between):.1f} ms (largest)"
    )


if __name__ == "__main__":
    main()
