"""Several processes: how they start, agree on errors, share the data and end."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mc_core.errors import UserError
from mc_jax.sharding import axes_sharding

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Number of processes of one parallel command of a cluster; JAX detects the rest.
CLUSTERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
MESSAGE_BYTES = 1024


def initialize(requested: bool, cpu_devices: int) -> None:
    """Connect the processes of a run, and split the CPU into their shares of the devices.

    Processes are connected if `requested`, by `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`, or as tasks of SLURM or Open MPI.

    Args:
        requested: `run.distributed`.
        cpu_devices: number of devices of all processes, if they have no accelerator.

    Raises:
        UserError: the processes cannot be connected.
    """
    from mc_jax.sharding import request

    numbers = {name: _number(name) for name in (COUNT, INDEX, *CLUSTERS)}
    in_cluster = any((numbers[name] or 1) > 1 for name in CLUSTERS)
    processes = 1
    if requested or in_cluster or COORDINATOR in os.environ:
        counts = (numbers[name] for name in (COUNT, *CLUSTERS))
        processes = next((count for count in counts if count is not None), 1)
        # At SIGTERM, Orbax prints the step in every process. The command prints it once.
        logging.getLogger("absl").addFilter(lambda x: "preemption sync point" not in x.getMessage())
        try:
            jax.distributed.initialize(num_processes=numbers[COUNT], process_id=numbers[INDEX])
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"cannot connect the processes ({reason}): start them with SLURM or Open MPI, or "
                f"set {COORDINATOR}, {COUNT} and {INDEX}"
            ) from error
    request(cpu_devices // processes)


def is_main() -> bool:
    """Return True in the process that writes logs, curves, pictures and reports."""
    return jax.process_index() == 0


def from_main(value: bool) -> bool:
    """Return the main process's value."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


@contextmanager
def together() -> Iterator[None]:
    """Raise an error on all processes if the block raises a `UserError` or `OSError` on one."""
    error: UserError | OSError | None = None
    try:
        yield
    except (UserError, OSError) as raised:
        error = raised
    if jax.process_count() > 1:
        text = b"" if error is None else (str(error) or type(error).__name__).encode()
        row = np.zeros(MESSAGE_BYTES, np.uint8)
        row[: len(text)] = np.frombuffer(text[:MESSAGE_BYTES], np.uint8)
        rows = multihost_utils.process_allgather(row)
        for process, message in enumerate(bytes(row).rstrip(b"\0") for row in rows):
            if message and error is None:
                raise UserError(f"process {process}: {message.decode(errors='replace')}")
    if error is not None:
        raise error


def own_rows(mesh: Mesh, rows: int) -> list[int] | None:
    """Return the rows of a microbatch that the devices of this process hold; None = all."""
    held = axes_sharding(mesh, "batch").addressable_devices_indices_map((rows,))
    parts = [index[0] for index in held.values() if index]
    found = sorted({row for part in parts for row in range(rows)[part]})
    return None if len(found) == rows else found


def to_mesh(batch: Any, mesh: Mesh, rows: int) -> Any:
    """Place a batch [accumulation, rows, ...], of which each process has its own rows."""
    sharding = axes_sharding(mesh, None, "batch")

    def place(x: Any) -> jax.Array:
        shape = (x.shape[0], rows, *x.shape[2:])
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), shape)

    return jax.tree.map(place, batch)


def to_host(tree: Any) -> Any:
    """Return arrays as NumPy arrays, gathered from all processes."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def terminated(step: int) -> bool:
    """Return True if a process got SIGTERM and this is the step after which all of them stop."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


@contextmanager
def lost_peers(advice: str) -> Iterator[None]:
    """Report a failed communication, usually because another process ended, as a `UserError`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"another process has failed ({reason[:120]}): {advice}") from error


def leave(code: int) -> None:
    """End a process that failed without waiting for the others, as JAX does at exit."""
    if code and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise UserError(f"{name} = {text!r}: must be an integer >= 0")
    return int(text)
