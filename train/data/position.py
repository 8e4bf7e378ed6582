"""The position of a data set in a checkpoint, which does not depend on the number of processes."""

import json
from dataclasses import dataclass
from typing import Any

import jax  # import before grain: without jax, grain only logs a warning

# isort: split
import grain
import orbax.checkpoint as ocp

FILE = "process_0-of-1.json"  # the name that grain gives to the file of a single process


class PositionHandler(ocp.CheckpointHandler):
    """Saves and restores the position of an iterator over global batches, as JSON."""

    def save(self, directory: Any, args: "PositionSave") -> None:
        """Save the position; all processes have the same one."""
        if jax.process_index() == 0:
            (directory / FILE).write_text(json.dumps(args.state, indent=4))

    def restore(self, directory: Any, args: "PositionRestore") -> grain.DatasetIterator:
        """Set the position of the iterator."""
        args.item.set_state(json.loads((directory / FILE).read_text()))
        return args.item


@ocp.args.register_with_handler(PositionHandler, for_save=True)
@dataclass
class PositionSave(ocp.args.CheckpointArgs):
    """Save the position that an iterator's `get_state` returned."""

    state: dict[str, Any]


@ocp.args.register_with_handler(PositionHandler, for_restore=True)
@dataclass
class PositionRestore(ocp.args.CheckpointArgs):
    """Set the position of an iterator."""

    item: grain.DatasetIterator
