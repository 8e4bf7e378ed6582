"""`python -m parity` is `mc parity`."""

from mc_core.__main__ import main

if __name__ == "__main__":
    main(["parity"])
