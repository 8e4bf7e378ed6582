"""The notebook `examples/quickstart.ipynb` is well-formed, and its code runs."""

import ast
import importlib
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
CONTENT = json.loads(NOTEBOOK.read_text())
CODE = [cell for cell in CONTENT["cells"] if cell["cell_type"] == "code"]
TEXT = [cell for cell in CONTENT["cells"] if cell["cell_type"] == "markdown"]
FEW_STEPS = 10
LONGEST = 1000  # characters of a text output
LARGEST = 200_000  # bytes of the file, which contains the pictures


def source(cell: dict) -> str:
    return "".join(cell["source"])


def output_texts(cell: dict) -> list[str]:
    """Return the outputs of a cell as text, without pictures."""
    outputs = cell["outputs"]
    texts = [output.get("text") or output.get("data", {}).get("text/plain") for output in outputs]
    return ["".join(text) for text in texts if text]


def imported_names() -> list[tuple[str, str | None]]:
    """Return all imported (module, name); name is None for a whole module."""
    names: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse("\n".join(map(source, CODE)))):
        if isinstance(node, ast.Import):
            names += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [(str(node.module), alias.name) for alias in node.names]
    return names


def test_notebook_format():
    assert CONTENT["nbformat"] == 4
    assert NOTEBOOK.stat().st_size < LARGEST
    ids = [cell["id"] for cell in CONTENT["cells"]]
    assert len(ids) == len(set(ids))
    assert len(CODE) + len(TEXT) == len(ids)


def test_notebook_outputs_are_of_one_complete_run():
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert not [x for x in outputs if x["output_type"] == "error" or x.get("name") == "stderr"]


def test_notebook_outputs_are_short_and_have_no_paths():
    texts = [text for cell in CODE for text in output_texts(cell)]
    assert len(texts) > 5
    assert max(map(len, texts)) < LONGEST
    assert not [text for text in texts if re.search(r"(^|[\s'\"])(/\w+/|[A-Z]:\\)", text, re.M)]


def test_notebook_imports_exist():
    names = imported_names()
    assert ("mc_jax", "LanguageModel") in names
    for module, name in names:
        found = importlib.import_module(module)
        assert name is None or hasattr(found, name), (module, name)


def test_notebook_links_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", "\n".join(map(source, TEXT)))
    assert links
    assert all((NOTEBOOK.parent / link).is_file() for link in links), links


@pytest.mark.slow
def test_notebook_runs(capsys):
    """Streams and PyTorch equal the full pass after a few steps of training."""
    code = "\n\n".join(map(source, CODE))
    code, count = re.subn(r"^STEPS = \d+$", f"STEPS = {FEW_STEPS}", code, flags=re.M)
    assert count == 1
    space: dict = {"__name__": "quickstart"}
    backend = plt.get_backend()
    plt.switch_backend("Agg")
    try:
        exec(compile(code, NOTEBOOK.name, "exec"), space)
    finally:
        plt.close("all")
        plt.switch_backend(backend)
    assert "largest difference" in capsys.readouterr().out
    full = space["full"]
    assert full.shape == (1, space["TOKENS"], space["VOCAB"])
    assert abs(full).max() > 0
    assert abs(space["streamed"] - full).max() < 1e-4
    assert abs(space["torch_logits"] - full).max() < 1e-4
    assert space["gates"].sum(-1) == pytest.approx(1, abs=1e-5)
