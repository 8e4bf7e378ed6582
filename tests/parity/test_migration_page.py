"""The code of the migration page runs, and old and new code agree."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_run import mc

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
BLOCKS = re.findall(r"^```python\n# (old|new)\n(.*?)^```", PAGE.read_text(), re.M | re.S)
COMMAND, OUTPUT = re.search(r"^```console\n\$ (.*)\n(.*)\n```", PAGE.read_text(), re.M).groups()
RESULTS = ("y", "masked", "uneven", "memory", "pooled", "length", "segment", "count", "weights")

pytestmark = pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="memory-caching 0.1.0 is for Python < 3.13"
)


def unnumbered(text: str) -> str:
    return re.sub(r"\d\.\d+e-\d+|\b0\.0e\+00", "#", text)


def assert_same(new: Any, old: Any) -> None:
    new, old = (torch.as_tensor(value, dtype=torch.float64) for value in (new, old))
    torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


def test_code_blocks_run_and_agree(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x, mask = torch.randn(2, 37, 64), torch.rand(2, 37) > 0.2
    spaces: dict[str, dict[str, Any]] = {name: {"x": x, "mask": mask} for name in ("old", "new")}
    assert [name for name, _ in BLOCKS] == ["old", "new"] * (len(BLOCKS) // 2)
    seen = set()
    for (_, old), (_, new) in zip(BLOCKS[::2], BLOCKS[1::2], strict=True):
        with torch.no_grad():
            exec(old, spaces["old"])
            built = spaces["new"].get("config")
            exec(new, spaces["new"])
        if "from_community" in new:  # the page constructs the configuration by hand
            assert built == spaces["new"]["config"]
        elif built:
            for name in RESULTS:
                if re.search(rf"^{name}\b", new, re.M) or f"{name}, " in new:
                    assert_same(spaces["new"][name], spaces["old"][name])
                    seen.add(name)
    assert seen == set(RESULTS)
    program, *words = COMMAND.split()
    assert program == "mc"
    assert mc(monkeypatch, *words) == 0
    assert unnumbered(capsys.readouterr().out.strip()) == unnumbered(OUTPUT)


def test_python_blocks_are_labeled():
    assert len(BLOCKS) == PAGE.read_text().count("```python") == 10
