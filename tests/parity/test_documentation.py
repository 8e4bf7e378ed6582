"""Code, commands, names and links in the documentation are valid.

The code of the pages on streaming and migration has tests of its own, which also compare results.
"""

import re
from pydoc import locate

import pytest

import mc_core
import mc_jax
import mc_torch
from helpers.documentation import (
    FENCE,
    PAGES,
    ROOT,
    code_blocks,
    commands,
    parse_command,
    relative,
)
from mc_core.aggregations import AGGREGATIONS
from mc_core.config import GATES, MIXERS, SEGMENTATIONS, START_MODES
from mc_core.memories import MEMORIES

TESTED_ELSEWHERE = {"docs/guides/stream.md", "docs/migration.md"}
WITH_PYTHON = [p for p in PAGES if code_blocks(p, "python") and relative(p) not in TESTED_ELSEWHERE]
DOCS = ROOT / "docs"
IMPORTED_KIND = "decayed_delta"  # registered by `--import examples/custom_memory.py`
PACKAGES = {"mc_core": mc_core, "mc_jax": mc_jax, "mc_torch": mc_torch}


@pytest.fixture
def registries():
    """Restore the registries of memories after the test."""
    registries = (MEMORIES, mc_jax.backends.base.BACKENDS, mc_torch.backends.base.BACKENDS)
    before = [dict(registry) for registry in registries]
    yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)


def rows(text: str) -> list[list[str]]:
    """Return the cells of all table rows, headers included."""
    lines = re.findall(r"^\|(.*)\|$", text, re.M)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


SLOW_PAGES = ("docs/getting_started.md",)  # trains, and generates in both packages


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if relative(page) in SLOW_PAGES else ())
        for page in WITH_PYTHON
    ],
    ids=relative,
)
def test_python_blocks_run(page, registries, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    for code in code_blocks(page, "python"):
        exec(compile(code, relative(page), "exec"), space)


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=relative)
def test_commands_parse(page):
    """All commands and options exist, and so do the files of this repository."""
    for words in commands(page):
        if words[0] == "--import":
            words = ["linear" if word == IMPORTED_KIND else word for word in words[2:]]
        parse_command(words, names_only=True)
        files = [word for word in words if re.match(r"(configs|examples|docs)/", word)]
        assert all((ROOT / file).is_file() for file in files), words


def test_make_targets_exist():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    for page in PAGES:
        text = "\n".join(code_blocks(page, "sh")) + " ".join(spans(FENCE.sub("", page.read_text())))
        assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= set(targets), relative(page)


def test_code_of_equations_exists():
    """Names in the column `code` exist in both packages, and all tests exist."""
    page = (DOCS / "equations.md").read_text()
    column, names, tests = 0, set(), set()
    for cells in rows(page):
        column = cells.index("code") if "code" in cells else column
        tests.update(span for cell in cells for span in spans(cell) if "::" in span)
        names.update(name for name in spans(cells[column]) if column and "::" not in name)
    assert len(names) > 30
    for name in names:
        paths = [name] if name.startswith("mc_core.") else [f"mc_jax.{name}", f"mc_torch.{name}"]
        assert all(locate(path) is not None for path in paths), name
    assert len(tests) > 30
    for file, name in (test.split("::") for test in tests):
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M), name


def test_equations_of_the_code_are_listed():
    """Equation numbers in docstrings and comments of the packages are on the page."""
    first = " ".join(cells[0] for cells in rows((DOCS / "equations.md").read_text()))
    listed = set(re.findall(r"\b\d+\b", first))
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    used = set()
    for file in files:
        for numbers in re.findall(r"\b[Ee]quations? ([\d, and]+)", file.read_text()):
            used.update(re.findall(r"\d+", numbers))
    assert used
    assert used <= listed


@pytest.mark.parametrize("name", PACKAGES)
def test_reference_lists_all_public_names(name):
    page = (DOCS / "reference" / f"{name}.md").read_text()
    assert sorted(re.findall(rf"^::: {name}\.(\w+)$", page, re.M)) == PACKAGES[name].__all__


def test_variants_table_is_complete():
    """README: every memory, every aggregation, and where `soup` equals `grm`."""
    page = (ROOT / "README.md").read_text()
    header, _, *lines = rows(page[page.index("## Memories and aggregations") :])[
        : 2 + len(MEMORIES)
    ]
    assert [spans(cell)[0] for cell in header[1:]] == list(AGGREGATIONS)
    assert [spans(cells[0])[0] for cells in lines] == [c.__name__ for c in MEMORIES.values()]
    soup = 1 + list(AGGREGATIONS).index("soup")
    for cells, memory in zip(lines, MEMORIES.values(), strict=True):
        assert (cells[soup] == "= grm") == memory().linear_in_weights


def test_options_table_is_complete():
    """Getting started: the values of options with a fixed set of values."""
    page = (DOCS / "getting_started.md").read_text()
    options = {cells[0].strip("`"): spans(cells[1]) for cells in rows(page)}
    assert options["memory"] == [cls.__name__ for cls in MEMORIES.values()]
    assert options["aggregation"] == list(AGGREGATIONS)
    assert {*options["segmentation"]} == {*SEGMENTATIONS, "segment_size", "segment_lengths"}
    assert {*options["gate"]} == set(GATES)
    assert {*options["state_init_mode"]} == set(START_MODES)
    mixers = " ".join(cells[0] for cells in rows(page) if cells[0].startswith("`("))
    assert set(re.findall(r'"(\w+)"', mixers)) == set(MIXERS)


def test_paths_of_the_layout_exist():
    page = (DOCS / "layout.md").read_text()
    paths = [path for cells in rows(page) for path in spans(cells[0]) if "/" in path]
    assert len(paths) > 40
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_readme_links_exist():
    """`mkdocs build --strict` checks the links of all other pages."""
    page = (ROOT / "README.md").read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]+)#?([^)]*)\)", page):
        assert (ROOT / target).is_file(), target
        headings = re.findall(r"^#+ (.*)$", (ROOT / target).read_text(), re.M) if anchor else ()
        slugs = [re.sub(r"[^\w]+", "-", heading.lower()).strip("-") for heading in headings]
        assert not anchor or anchor in slugs, (target, anchor)


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("C*.md")], ids=relative)
def test_prose_has_at_most_120_columns(page):
    """Tables, pictures and code blocks may be wider."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S).splitlines()
    assert [line for line in prose if len(line) > 120 and not line.startswith(("|", "!["))] == []
