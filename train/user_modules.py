"""Import of user modules, for example to register a memory: `mc --import FILE ...`."""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from mc_core.errors import UserError

OPTION = "--import"
VARIABLE = "MC_IMPORT"  # module names, separated by os.pathsep; inherited by worker processes


def split_imports(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the names of leading `--import NAME` options and the rest.

    Raises:
        UserError: an `--import` has no name.
    """
    names, rest = [], list(words)
    while rest and rest[0].partition("=")[0] == OPTION:
        word, rest = rest[0], rest[1:]
        name = word.partition("=")[2]
        if "=" not in word and rest:
            name, rest = rest[0], rest[1:]
        if not name:
            raise UserError(f"{OPTION}: needs a module or a .py file")
        names.append(name)
    return names, rest


def import_modules(names: Sequence[str]) -> None:
    """Import modules by name, or `.py` files by path, in this process and its child processes.

    Raises:
        UserError: a module cannot be imported.
    """
    absolute = [str(Path(name).absolute()) if name.endswith(".py") else name for name in names]
    known = list(filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)))
    for name in absolute:
        _import(name)
    os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys([*known, *absolute]))


def import_from_environment() -> None:
    """Import the modules in `MC_IMPORT`.

    Raises:
        UserError: a module cannot be imported.
    """
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        _import(name)


def _import(name: str) -> None:
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return
        module = Path(name).stem
        if module in sys.modules:
            return
        spec = spec_from_file_location(module, name)
        assert spec is not None
        assert spec.loader is not None
        loaded = module_from_spec(spec)
        # Needed to unpickle objects of this module, such as the configuration of a run.
        sys.modules[module] = loaded
        try:
            spec.loader.exec_module(loaded)
        except BaseException:
            del sys.modules[module]
            raise
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{OPTION} {name}: {error}") from error
