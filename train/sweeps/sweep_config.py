"""Configuration of a sweep: rows of overrides, seeds, and learning rates."""

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mc_core.checks import ConfigError, check_range, raise_config_error
from mc_core.errors import UserError
from mc_core.serialization import from_dict, non_defaults
from mc_core.tree_utils import flatten
from train.config import FREE_KEYS, TextConfig, TrainConfig, load_config
from train.config.yaml_files import read_yaml, to_plain

# Keys set by the sweep, which rows must not set.
RESERVED_KEYS = ("run.seed", "optimizer.learning_rate", "run.directory")
Overrides = dict[str, Any]  # dotted key -> value


@dataclass(frozen=True)
class SweepConfig:
    """A sweep, read from its YAML file.

    Attributes:
        base: YAML file of a run; the path is relative to the folder of the sweep's file.
        directory: output directory; default `runs/<name of the sweep's file>`.
        vary: mapping from dotted keys to lists of values; each combination of values is a row.
        rows: additional rows, each a mapping of overrides.
        seeds: random seeds of each row; the rate is chosen with the first one.
        rates: learning rates; None = that of the base.
        examples: number of test examples per length and depth; None = default of `mc evaluate`.

    Raises:
        ValueError: a value is not allowed; the message has field, value and allowed values.
    """

    base: Path
    directory: str
    vary: tuple[dict[str, Any], ...] = ()
    rows: tuple[Overrides, ...] = ()
    seeds: tuple[int, ...] = (0,)
    rates: tuple[float, ...] | None = None
    examples: int | None = None

    def __post_init__(self) -> None:
        check_range(self, "examples", 1)
        for options in self.vary:
            for key, values in options.items():
                if not isinstance(values, list) or not values:
                    raise_config_error("SweepConfig", f"vary.{key}", values, "a list of values")
        for key in itertools.chain(*self.vary, *self.rows):
            if key in RESERVED_KEYS:
                raise_config_error(
                    "SweepConfig", "vary or rows", key, "no key set by seeds, rates or directory"
                )
        for name in ("seeds", "rates"):
            values = getattr(self, name)
            if values is not None and not (values and len(set(values)) == len(values)):
                raise_config_error("SweepConfig", name, list(values), "a list of different values")
        # The folder name of a run has six digits of its rate.
        if len({f"{rate:g}" for rate in self.rates or ()}) < len(self.rates or ()):
            raise_config_error(
                "SweepConfig", "rates", list(self.rates or ()), "different in six digits"
            )

    def all_rows(self) -> dict[str, Overrides]:
        """Return the overrides of all rows by row name, which is a valid folder name.

        Raises:
            ValueError: two rows are equal, or there is no row.
        """
        rows = [*self.rows]
        for options in self.vary:
            for values in itertools.product(*options.values()):
                rows.append(dict(zip(options, values, strict=True)))
        rows = rows or [{}]
        last = [key.rpartition(".")[2] for key in dict.fromkeys(k for row in rows for k in row)]
        named: dict[str, Overrides] = {}
        for row in rows:
            name = row_name(row, {word for word in last if last.count(word) > 1})
            if name in named:
                raise_config_error("SweepConfig", "vary or rows", name, "different rows")
            named[name] = row
        return named


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        row: name of its row.
        overrides: overrides of the base.
        seed: random seed.
        rate: learning rate.
        config: configuration of the run.
        examples: number of test examples per length and depth; None = default of `mc evaluate`.
    """

    row: str
    overrides: Overrides
    seed: int
    rate: float
    config: TrainConfig
    examples: int | None

    @property
    def key(self) -> tuple[str, int, float]:
        """Key of the run in the results."""
        return self.row, self.seed, self.rate

    @property
    def name(self) -> str:
        """Name of the run in messages."""
        return f"{self.row} rate={self.rate:g} seed={self.seed}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the settings that determine the result, without those at their defaults."""
        settings = {k: v for k, v in flatten(non_defaults(self.config)) if k not in FREE_KEYS}
        text = json.dumps([settings, self.examples], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def tokenizer(self) -> str | None:
        """SHA-256 of its tokenizer file; None for bytes and for tasks without text."""
        # This import loads jax; a worker must set its cores before.
        from train.data.tokenizer_copy import tokenizer_hash

        return tokenizer_hash(self.config)


def row_name(overrides: Overrides, ambiguous: Collection[str] = ()) -> str:
    """Return a name such as `kind=titans,aggregation=grm`; only ambiguous keys are complete."""
    parts = []
    for key, value in overrides.items():
        word = key.rpartition(".")[2]
        shown = value if isinstance(value, str) else json.dumps(value)
        shown = re.sub(r"[^\w.+-]+", "-", shown).strip("-")
        parts.append(f"{key if word in ambiguous else word}={shown}")
    name = ",".join(parts) or "base"
    if len(name) > 120:
        name = f"{name[:111]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def load_sweep(path: Path) -> SweepConfig:
    """Read the YAML file of a sweep; unknown keys are errors.

    Raises:
        UserError: the file cannot be read, or a key or value is not allowed.
    """
    data = to_plain(read_yaml(path), path)
    if isinstance(data.get("vary"), dict):
        data["vary"] = [data["vary"]]
    try:
        sweep = from_dict(SweepConfig, {"directory": f"runs/{path.stem}"} | data)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return replace(sweep, base=path.parent / sweep.base)


def make_run(
    sweep: SweepConfig, row: str, overrides: Overrides, seed: int, rate: float | None
) -> Run:
    """Return a run of a row; its folder is `<directory>/<row>/rate=<rate>,seed=<seed>`.

    Raises:
        UserError: the base cannot be read, or an override is not allowed.
    """
    words = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    words.append(f"run.seed={seed}")
    if rate is not None:
        words.append(f"optimizer.learning_rate={rate!r}")
    rate = load_config(sweep.base, words).optimizer.learning_rate if rate is None else rate
    folder = Path(sweep.directory, row, f"rate={rate:g},seed={seed}")
    config = load_config(sweep.base, [*words, f"run.directory={json.dumps(str(folder))}"])
    if isinstance(config.data, TextConfig) and sweep.examples is not None:
        raise UserError(f"{sweep.base}: examples = {sweep.examples}: not supported for text")
    return Run(row, overrides, seed, rate, config, sweep.examples)


def make_runs(sweep: SweepConfig) -> dict[str, list[Run]]:
    """Return, for each row, the runs of all rates with the first seed.

    Raises:
        UserError: a configuration is not allowed, or the rows have different tasks.
    """
    rates: Sequence[float | None] = sweep.rates or [None]
    try:
        rows = sweep.all_rows()
    except ConfigError as error:
        raise UserError(error.problem) from error
    runs = {
        row: [make_run(sweep, row, overrides, sweep.seeds[0], rate) for rate in rates]
        for row, overrides in rows.items()
    }
    tasks = sorted({run.config.data.task for own in runs.values() for run in own})
    if len(tasks) > 1:
        raise UserError(
            f"{sweep.base}: data.task = {', '.join(tasks)}: must be the same in all rows"
        )
    return runs
