"""Write the tables and pictures of docs/results.md: `python -m tools.results`."""

from mc_core.files import write_atomic
from tools.results.plots import draw
from tools.results.tables import ROOT, read_specs, render

PAGE = ROOT / "docs" / "results.md"

if __name__ == "__main__":
    specs = read_specs()
    write_atomic(PAGE, render(PAGE.read_text(encoding="utf-8"), specs).encode())
    for name, spec in specs.items():
        if picture := spec.get("picture"):
            write_atomic(PAGE.parent / picture, draw(name, spec))
