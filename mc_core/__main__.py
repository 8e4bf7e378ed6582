"""Entry point of `mc` and `python -m mc_core`, in the package whose name is unique."""

import sys
from collections.abc import Sequence

from mc_core.errors import UserError
from mc_core.installation import check_packages


def main(command: Sequence[str] = ()) -> None:
    """Run the command line; if another package shadows one of ours, exit with code 2.

    Args:
        command: arguments inserted before those of the command line, such as the name of a group.
    """
    try:
        check_packages()
    except UserError as error:
        print("mc:", error, file=sys.stderr)
        sys.exit(2)
    from train.__main__ import main as run

    run(command)


if __name__ == "__main__":
    main()
