"""docs/results.md: tables and figures come from the recorded runs."""

import re
from pathlib import Path

import pytest

from mc_core.errors import UserError
from tools.results.plots import draw
from tools.results.tables import column_runs, read_specs, render, select, shown, table_lines

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*\.\d+|\d+(?=%)|\d+(?= kB)")
MOST_WORDS = 1500
CELL = {"tokens": 8, "asked": 4}


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def sections() -> list[str]:
    return re.split(r"^## ", page(), flags=re.MULTILINE)[1:]


def prose(section: str) -> str:
    """Return a section without tables, code and links."""
    section = re.sub(r"```.*?```", "", section, flags=re.DOTALL)
    lines = [line for line in section.splitlines() if not line.startswith("|")]
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", "\n".join(lines))


@pytest.mark.parametrize("path", [PAGE, ROOT / "README.md"], ids=lambda path: path.name)
def test_tables_are_those_of_the_recorded_runs(path):
    text = path.read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert render(text, read_specs()) == text, "make results"


def test_every_number_is_in_a_table_of_its_section():
    for section in sections():
        cells = " ".join(line for line in section.splitlines() if line.startswith("|"))
        known = {number.strip("+-−") for number in re.findall(r"[-+−]?\d[\d,]*\.?\d*", cells)}
        used = {number.strip("+-−") for number in NUMBER.findall(prose(section))}
        assert used <= known, section.splitlines()[0]


def test_page_is_short_and_has_its_pictures():
    words = sum(len(prose(section).split()) for section in sections())
    assert words <= MOST_WORDS
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page())
    assert len(pictures) >= 6
    for picture in pictures:
        assert (PAGE.parent / picture).is_file(), picture
    drawn = {spec["picture"] for spec in read_specs().values() if "picture" in spec}
    assert drawn <= set(pictures)


def test_cells_are_means_and_ranges():
    runs = [
        {"overrides": {"a.kind": "x"}, "seed": seed, "test": [cell]}
        for seed, cell in enumerate([CELL | {"right": 4}, CELL | {"right": 2}])
    ]
    runs.reverse()
    found = select(runs, {"kind": "x"})
    assert [run["seed"] for run in found] == [0, 1]
    assert shown(found, "accuracy") == "75.0 (50.0–100.0)"
    assert select(runs, {"kind": "x", "step": 1}) == []
    texts = [{"recall": [[0.1, 0.3], [0.4, 0.4]]}, {"recall": [[0.0, None], [-0.2, 0.2]]}]
    assert shown(texts, "recall") == "0.15 (0.00–0.30)"


def test_rows_take_precedence_over_columns():
    found = column_runs("recall", read_specs()["recall"])
    modes = {
        row: {run["overrides"]["model.layer.state_init_mode"] for run in found[row, "grm"]}
        for row in ("linear", "Titans, orthogonal (hidden 16)")
    }
    assert list(modes.values()) == [{"restart"}, {"checkpoint"}]


def test_missing_runs_and_tables_are_named():
    spec = {"record": "gates.jsonl", "value": "accuracy", "rows": {"a row": {"kind": "nothing"}}}
    with pytest.raises(UserError, match="no run of 'a row'"):
        table_lines("gates", spec)
    with pytest.raises(UserError, match="'nothing' is not in"):
        render("<!-- table: nothing -->\n<!-- end -->", {})


def test_charts_are_drawn():
    name, spec = next((n, s) for n, s in read_specs().items() if "picture" in s)
    assert draw(name, spec).startswith(b"\x89PNG")
