"""Substitute for a run in a worker; nothing here imports jax, so workers start quickly."""

import os
import signal
import sys
import time
from pathlib import Path

from mc_core.errors import UserError
from train.sweeps.sweep_config import Run, load_sweep, make_runs
from train.sweeps.workers import Workers


def look_around(run: Run) -> dict:
    """Return what a worker is given; some rows fail, and `meets` waits for another worker."""
    if run.row == "x=user":
        raise UserError("no space")
    if run.row == "x=bug":
        raise ZeroDivisionError("no space")
    if run.row == "x=dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if run.row.startswith("x=meets"):
        folder = Path(run.config.run.directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(os.getpid())).touch()
        wait_for(lambda: len(list(folder.iterdir())) == 2)
    own = {"pid": os.getpid(), "cores": sorted(os.sched_getaffinity(0))}
    own["threads"] = os.environ.get("NPROC")
    return {"row": run.row, "seed": run.seed, "rate": run.rate} | own


def count_devices(run: Run) -> dict:
    """Return, as the error of a failed run, how many devices JAX sees."""
    import jax

    own = {"row": run.row, "seed": run.seed, "rate": run.rate, "fingerprint": run.fingerprint}
    shown = {"overrides": run.overrides, "state_bytes": 0, "state_tokens": 0}
    return own | shown | {"error": f"{jax.local_device_count()} devices"}


def wait_for(condition, seconds: float = 120) -> None:
    """Wait until something holds, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def linger(run: Run) -> dict:
    """Say that the run has begun; of a narrow model, never come back."""
    folder = Path(run.config.run.directory)
    folder.mkdir(parents=True)
    (folder / "begun").touch()
    while run.row == "d_model=8":
        time.sleep(1)
    return {}


def main() -> None:
    """Start the runs of a sweep: one lingers, and one worker has nothing more to do."""
    # Ignored, and by every process that is born, where the tests run in a shell's background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Workers(2, linger) as workers:
            for runs in make_runs(load_sweep(Path(sys.argv[1]))).values():
                workers.start(runs[0])
            while workers.busy:
                list(workers.results())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
