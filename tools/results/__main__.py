"""Write the generated tables of docs/results.md: `python -m tools.results`."""

from mc_core.files import write_atomic
from tools.results.tables import ROOT, read_specs, render

PAGE = ROOT / "docs" / "results.md"

if __name__ == "__main__":
    text = render(PAGE.read_text(encoding="utf-8"), read_specs())
    write_atomic(PAGE, text.encode())
