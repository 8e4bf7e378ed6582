"""`python -m parity` is `mc parity`."""

import sys

from train.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["parity"]
    main()
