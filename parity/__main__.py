"""`python -m parity` is `mc parity`: a door to the command, which lives above this room."""

import sys

from train.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["parity"]
    main()
