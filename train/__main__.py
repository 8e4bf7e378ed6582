"""The program `mc`, also `python -m train`: the command, once what it needs is installed."""

import logging
import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command; a library that is not installed is one line and exit code 2."""
    _log_to_stderr()
    try:
        from train.cli import main as run

        run()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or find_spec(package):
            raise
        extra = "torch" if package == "torch" else "train"
        install = f"pip install 'memory-caching-jax[{extra}]'"
        print(f"mc: {package} is not installed: {install}", file=sys.stderr)
        sys.exit(2)


def _log_to_stderr() -> None:
    """Print what mc_core logs as the command's own lines; libraries set up the root logger."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("mc: %(message)s"))
    log = logging.getLogger("mc_core")
    log.handlers, log.propagate = [handler], False


if __name__ == "__main__":
    main()
