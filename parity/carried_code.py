"""Code of the model in a folder of Hugging Face transformers, for `trust_remote_code=True`.

transformers copies the Python files of a folder into one package, and follows only imports of the
form `from .name import ...`. So the modules of `mc_core` and `mc_torch` that the model needs are
written to one folder under flat names, with relative imports.
"""

import ast
import importlib.util
import json
from pathlib import Path

PACKAGES = ("mc_core", "mc_torch")
ENTRY = "mc_torch.hf.modeling"


def flat_name(module: str) -> str:
    """Return the name of a module in the folder: `mc_core.config` becomes `mc_core_config`."""
    return module.replace(".", "_")


MODELING = flat_name(ENTRY)
# Both classes from one file: transformers copies the code once for each file that it names here.
AUTO_MAP = {
    "AutoConfig": f"{MODELING}.MemoryCachingConfig",
    "AutoModelForCausalLM": f"{MODELING}.MemoryCachingForCausalLM",
}


def carried_files() -> dict[str, str]:
    """Return the name and content of each Python file that the model needs."""
    files: dict[str, str] = {}
    waiting = [ENTRY]
    while waiting:
        module = waiting.pop()
        name = f"{flat_name(module)}.py"
        if name not in files:
            files[name], used = rewrite(_source(module))
            waiting += used
    return files


def add_code(folder: Path) -> None:
    """Add the code of the model to a folder with a `config.json`."""
    for name, source in carried_files().items():
        (folder / name).write_text(source)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"auto_map": AUTO_MAP}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def rewrite(source: str) -> tuple[str, list[str]]:
    """Make the imports of our packages relative and flat.

    Args:
        source: content of a module, with imports of the form `from package.module import name`.

    Returns:
        the rewritten source, and the imported modules.

    Raises:
        ValueError: a module is imported in another form.
    """
    lines, used = source.splitlines(keepends=True), []
    for node in sorted(_imports(ast.parse(source)), key=lambda node: -node.lineno):
        start = lines[node.lineno - 1][: node.col_offset]
        module, members, new = node.module or "", [], []
        for alias in node.names:
            submodule = f"{module}.{alias.name}"
            if _is_module(submodule):
                name = alias.asname or alias.name
                new.append(f"{start}from . import {flat_name(submodule)} as {name}\n")
                used.append(submodule)
            else:
                members.append(ast.unparse(alias))
        if members:
            new.append(f"{start}from .{flat_name(module)} import {', '.join(members)}\n")
            used.append(module)
        lines[node.lineno - 1 : node.end_lineno] = new
    return "".join(lines), used


def _imports(tree: ast.AST) -> list[ast.ImportFrom]:
    """Return the imports of our packages."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names):
            raise ValueError(f"line {node.lineno}: must be `from package.module import name`")
        if isinstance(node, ast.ImportFrom) and node.module and _is_ours(node.module):
            found.append(node)
    return found


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent is a module, not a package
        return False


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text()
