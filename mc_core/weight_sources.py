"""Weights on disk: safetensors files, exported folders and training runs."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from mc_core.config import ModelConfig
from mc_core.prefixes import strip_prefixes
from mc_core.pretrained import VERSION, from_metadata, read_description
from mc_core.weights import Flat, to_torch

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # of a folder that `mc export` writes
MODEL_TYPE = "memory_caching"  # `model_type` of its configuration
EXPORT_PREFIX = "model."  # of its parameters
CHECKPOINTS = "checkpoints"  # folder of a run; its checkpoints are named by their step


def read_weights(
    path: str | PathLike[str], kind: Any, framework: str
) -> tuple[Any, dict[str, Any]]:
    """Return the configuration and the tensors of a file, an exported folder or a run.

    Prefixes that wrappers add to names are removed and logged.

    Args:
        path: safetensors file of `mc convert`, folder of `mc export`, or run directory, of which
            the last checkpoint is read.
        kind: allowed class: that of a layer's configuration, `ModelConfig`, or a union of them.
        framework: framework of the tensors of safetensors files, `np` or `pt`; those of a run are
            NumPy arrays.

    Returns:
        configuration, and tensors with PyTorch's names and layouts.

    Raises:
        ValueError: the content is damaged, of another format or class, or its configuration is
            invalid.
        OSError: a file cannot be read.
    """
    from safetensors import SafetensorError

    path = Path(path)
    try:
        if (path / CHECKPOINTS).is_dir():
            config, flat = read_run(path)
            return _checked(config, kind), to_torch(flat)
        if not path.is_dir():
            return _read_file(path, kind, framework)
        if not (path / CONFIG).is_file():
            raise ValueError(
                f"has neither {CHECKPOINTS} nor {CONFIG}: must be a run directory, a folder of "
                "`mc export` or a safetensors file"
            )
        return _read_export(path, kind, framework)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_run(path: Path) -> tuple[dict[str, Any], Flat]:
    """Return the parameters of a run's last checkpoint, without a framework.

    Args:
        path: run directory.

    Returns:
        the model's configuration as plain values, and the parameters with JAX's names and layouts.

    Raises:
        ValueError: there is no checkpoint, it cannot be read, or tensorstore is not installed.
        OSError: a file cannot be read.
    """
    steps = [int(x.name) for x in (path / CHECKPOINTS).iterdir() if x.name.isdecimal()]
    if not steps:
        raise ValueError("has no checkpoint: must be a run that has saved one")
    checkpoint = path / CHECKPOINTS / str(max(steps))
    try:
        config = json.loads((checkpoint / "meta" / "metadata").read_text())["config"]["model"]
        tree = json.loads((checkpoint / "state" / "_METADATA").read_text())
        paths = [
            [str(key["key"]) for key in leaf["key_metadata"]]
            for leaf in tree["tree_metadata"].values()
        ]
        driver = "zarr3" if tree.get("use_zarr3") else "zarr"
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"step {checkpoint.name} has an unknown format ({error!r})") from error
    names = [".".join(keys) for keys in paths if keys[0] == "params"]
    arrays = _read_arrays(checkpoint / "state", names, driver)
    return config, {name.removeprefix("params."): x for name, x in arrays.items()}


def _read_arrays(folder: Path, names: list[str], driver: str) -> Flat:
    """Read arrays of a checkpoint that Orbax has written, concurrently."""
    try:
        import tensorstore
    except ImportError as error:
        raise ValueError(
            "reading a run needs tensorstore: pip install 'memory-caching-jax[train]', or write a "
            "safetensors file with `mc convert`"
        ) from error
    base = f"file://{folder.resolve()}/"

    def spec(name: str) -> dict[str, Any]:
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        return {"driver": driver, "kvstore": store}

    opened = [tensorstore.open(spec(name), open=True, read=True) for name in names]
    reads = [future.result().read() for future in opened]
    return {name: read.result() for name, read in zip(names, reads, strict=True)}


def _read_file(path: Path, kind: Any, framework: str) -> tuple[Any, dict[str, Any]]:
    metadata, tensors = _read_tensors(path, framework)
    return from_metadata(metadata, kind), strip_prefixes(tensors, path)


def _read_export(path: Path, kind: Any, framework: str) -> tuple[Any, dict[str, Any]]:
    data = json.loads((path / CONFIG).read_text())
    if not isinstance(data, dict) or data.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{CONFIG} is not of model_type {MODEL_TYPE!r}")
    fields = ModelConfig.__dataclass_fields__
    config = _checked({name: data[name] for name in fields if name in data}, kind)
    if not (path / WEIGHTS).is_file():
        raise ValueError(f"has no {WEIGHTS}: sharded and other weights are not supported")
    _, tensors = _read_tensors(path / WEIGHTS, framework)
    if all(name.startswith(EXPORT_PREFIX) for name in tensors):
        tensors = {name.removeprefix(EXPORT_PREFIX): x for name, x in tensors.items()}
    return config, strip_prefixes(tensors, path)


def _read_tensors(path: Path, framework: str) -> tuple[dict[str, str] | None, dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework=framework) as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _checked(config: dict[str, Any], kind: Any) -> Any:
    description = {"version": VERSION, "module": "LanguageModel", "config": config}
    return read_description(description, kind)
