"""The table of mutants: YAML files in `tables/`, read strictly.

A file maps the name of a mutant to

    fault: description of the fault in one line
    file: the source file, relative to the repository
    old: text that occurs exactly once in it
    new: the text that replaces it
    tests: {test_file: expression}   # tests that should catch it, in order

A test file is named without `.py` and is looked up anywhere under `tests/`. The expression is
pytest's `-k`; null selects the whole file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TABLES = Path(__file__).parent / "tables"
KEYS = {"fault", "file", "old", "new", "tests"}

Selection = dict[str, str | None]  # test file -> expression


@dataclass(frozen=True)
class Mutant:
    """One fault, and the tests that should catch it.

    Attributes:
        name: unique name.
        fault: what is wrong.
        file: the source file, relative to the repository.
        old: the text that is replaced.
        new: the text that replaces it.
        tests: test files, each with the expression that selects its tests, or None for all.
    """

    name: str
    fault: str
    file: str
    old: str
    new: str
    tests: Selection

    def apply(self, tree: Path) -> str:
        """Return the mutated source file of a copy of the repository.

        Raises:
            ValueError: the text does not occur exactly once, or the fault changes nothing.
        """
        path = tree / self.file
        if not path.is_file():
            raise ValueError(f"{self.name}: {self.file}: no such file")
        source = path.read_text()
        count = source.count(self.old)
        if count != 1:
            raise ValueError(
                f"{self.name}: {self.file}: must have exactly one {self.old!r}, has {count}"
            )
        if self.old == self.new:
            raise ValueError(f"{self.name}: old and new are equal")
        return source.replace(self.old, self.new)


def load_mutants(folder: Path = TABLES) -> list[Mutant]:
    """Read all tables of a folder.

    Raises:
        ValueError: a table is invalid; the message has the table and the mutant.
    """
    mutants: dict[str, Mutant] = {}
    for path in sorted(folder.glob("*.yaml")):
        rows: Any = yaml.safe_load(path.read_text())
        for name, row in rows.items():
            if name in mutants:
                raise ValueError(f"{path.name}: {name}: occurs twice")
            mutants[name] = _read(f"{path.name}: {name}", name, row)
    return list(mutants.values())


def _read(where: str, name: str, row: Any) -> Mutant:
    if not isinstance(row, dict) or row.keys() != KEYS:
        raise ValueError(f"{where}: must have the keys {', '.join(sorted(KEYS))}")
    words = {key: row[key] for key in KEYS - {"tests"}}
    wrong = [key for key, value in words.items() if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"{where}: {wrong[0]} = {words[wrong[0]]!r}: must be text")
    tests = row["tests"]
    if not isinstance(tests, dict) or not tests:
        raise ValueError(f"{where}: tests = {tests!r}: must map test files to expressions")
    return Mutant(name, **words, tests=tests)


def choose(mutants: Sequence[Mutant], patterns: Sequence[str]) -> list[Mutant]:
    """Return the mutants that match a pattern such as `jax-*`; without patterns, all mutants.

    Raises:
        ValueError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(mutant.name, pattern) for mutant in mutants):
            raise ValueError(f"{pattern}: no mutant has this name")
    return [
        mutant
        for mutant in mutants
        if not patterns or any(fnmatchcase(mutant.name, pattern) for pattern in patterns)
    ]


def find_test_file(tree: Path, name: str) -> Path:
    """Return the test file of a name, relative to the repository.

    Raises:
        ValueError: there is no such file, or there are several.
    """
    found = sorted((tree / "tests").rglob(f"{name}.py"))
    if len(found) != 1:
        raise ValueError(f"{name}.py: must be one file under tests/, found {len(found)}")
    return found[0].relative_to(tree)


def join(mutants: Sequence[Mutant]) -> Selection:
    """Return, by test file, an expression for all tests that mutants select."""
    every: dict[str, list[str | None]] = {}
    for mutant in mutants:
        for name, expression in mutant.tests.items():
            every.setdefault(name, []).append(expression)
    return {
        name: " or ".join(f"({text})" for text in dict.fromkeys(found) if text)
        if all(found)
        else None
        for name, found in every.items()
    }
