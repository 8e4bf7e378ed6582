"""The command line after the checks of mc_core; also `python -m train`.

Reports missing packages in one line.
"""

import logging
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from mc_core.errors import UserError
from mc_core.installation import check_packages
from train.user_modules import import_from_environment, import_modules, split_imports


def main(command: Sequence[str] = ()) -> None:
    """Run the command line; a missing package gives a one-line error and exit code 2.

    Args:
        command: arguments inserted before those of the command line, such as the name of a group.
    """
    _log_to_stderr()
    try:
        check_packages()
        # Import first: the options of the commands list the registered memories.
        names, words = split_imports(sys.argv[1:])
        sys.argv[1:] = [*command, *words]
        import_from_environment()
        import_modules(names)
        from train.cli import main as run

        run()
    except UserError as error:
        print("mc:", error, file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or find_spec(package):
            raise
        extra = "torch" if package == "torch" else "train"
        install = f"pip install 'memory-caching-jax[{extra}]'"
        print(f"mc: {package} is not installed: {install}", file=sys.stderr)
        sys.exit(2)


def _log_to_stderr() -> None:
    """Print log messages of mc_core on stderr, independent of the root logger."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("mc: %(message)s"))
    log = logging.getLogger("mc_core")
    log.handlers, log.propagate = [handler], False


if __name__ == "__main__":
    main()
