"""Write the tables and pictures of docs/results.md and README.md: `python -m tools.results`."""

from mc_core.files import write_atomic
from tools.results.plots import draw
from tools.results.tables import ROOT, read_specs, render

DOCS = ROOT / "docs"

if __name__ == "__main__":
    specs = read_specs()
    for page in (ROOT / "README.md", DOCS / "results.md"):
        write_atomic(page, render(page.read_text(encoding="utf-8"), specs).encode())
    for name, spec in specs.items():
        if picture := spec.get("picture"):
            write_atomic(DOCS / picture, draw(name, spec))
