"""Rules of the source tree: import layers, single definitions, documented shapes, file length."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mc_core.aggregations import AGGREGATIONS
from mc_core.memories import MEMORIES

ROOT = Path(__file__).parents[2]
PACKAGES = ("mc_core", "mc_jax", "mc_torch", "parity", "bench", "train")
LINES = 400
POSITIONAL = 7

# Allowed imports between packages.
LAYERS = {
    "mc_core": set(),
    "mc_jax": {"mc_core"},
    "mc_torch": {"mc_core"},
    "parity": {"mc_core", "mc_jax", "mc_torch"},
    "bench": {"mc_core", "mc_jax", "mc_torch", "parity"},
    "train": {"mc_core", "mc_jax", "mc_torch", "parity", "bench"},
}
FRAMEWORKS = {"jax", "flax", "torch"}
MAY_IMPORT = {"mc_core": set(), "mc_jax": {"jax", "flax"}, "mc_torch": {"torch"}}
# The entry point calls the command line, which is in train.
EXCEPTIONS = {("mc_core/__main__.py", "train")}

NAMES = {*MEMORIES, *AGGREGATIONS} - {"none", "mean"}  # these two also have other meanings
CONFIGS = {cls.__name__ for cls in MEMORIES.values()} | {"MLPConfig"}
# The only importer of bench.
BENCH_COMMANDS = "train/cli/bench.py"
# Files that may branch on names of memories or aggregations: they define them, or convert from
# packages with other names.
DEFINE = {
    "mc_core/aggregations.py",
    "mc_core/memory_kinds.py",
    "parity/community.py",
    "bench/rivals.py",
    "bench/peers.py",
}


def sources(*packages: str) -> list[Path]:
    return [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the top-level package of every import, including inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def modules(tree: ast.AST) -> Iterator[str]:
    """Yield every imported module, and every imported name that may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_tests(tree: ast.AST, tests: set[str]) -> set[str]:
    """Return the test modules that a file imports."""
    return {name for name in modules(tree) if tests.intersection(name.split("."))}


def forbidden_imports(package: str, name: str, tree: ast.AST) -> set[str]:
    used = set(imports(tree))
    allowed = LAYERS[package] | {package} | {used for file, used in EXCEPTIONS if file == name}
    wrong = (used & set(PACKAGES)) - allowed
    return wrong | (used & FRAMEWORKS) - MAY_IMPORT.get(package, FRAMEWORKS)


def branches(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of every branch on the name or class of a memory or aggregation."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and part.value in NAMES:
                    yield node.lineno, str(part.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            for part in ast.walk(node.args[1]):
                if isinstance(part, ast.Name) and part.id in CONFIGS:
                    yield node.lineno, part.id
        elif isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if len(NAMES.intersection(k for k in keys if isinstance(k, str))) > 1:
                yield node.lineno, f"a table of {', '.join(map(str, keys))}"
        elif isinstance(node, ast.MatchValue) and getattr(node.value, "value", None) in NAMES:
            yield node.value.lineno, ast.unparse(node.value)


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yield the public functions of a module, and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    yield method


def takes_arrays(function: ast.FunctionDef) -> bool:
    arguments = [*function.args.args, *function.args.kwonlyargs]
    annotations = [a.annotation for a in arguments if a.annotation] + [function.returns]
    text = " ".join(ast.unparse(a) for a in annotations if a is not None)
    return bool(re.search(r"\b(Array|Weights)\b", text))


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_follow_layers(package):
    for file in sources(package):
        wrong = forbidden_imports(package, relative(file), ast.parse(file.read_text()))
        assert not wrong, f"{relative(file)} imports {', '.join(sorted(wrong))}"


def test_bench_is_imported_only_by_its_command():
    others = [file for package in PACKAGES if package != "bench" for file in sources(package)]
    users = [relative(file) for file in others if "bench" in imports(ast.parse(file.read_text()))]
    assert users == [BENCH_COMMANDS]


def test_test_files_are_not_imported():
    tests = {file.stem for file in sources("tests") if file.stem.startswith("test_")}
    found = {
        relative(file): names
        for file in sources(*PACKAGES, "tests", "tools", "examples")
        if (names := imported_tests(ast.parse(file.read_text()), tests | {"conftest"}))
    }
    assert not found


def test_test_file_names_are_unique():
    """Test modules are imported by file name, regardless of their folder."""
    names = [file.stem for file in sources("tests") if file.stem != "__init__"]
    assert len(names) == len(set(names))


def test_no_branches_on_memory_or_aggregation_names():
    found = [
        f"{relative(file)}:{line} branches on {word}"
        for file in sources(*PACKAGES)
        if relative(file) not in DEFINE and "backends" not in file.parts
        for line, word in branches(ast.parse(file.read_text()))
    ]
    assert not found, "\n".join(found)


def test_public_functions_on_arrays_document_shapes():
    found = []
    for file in sources("mc_jax", "mc_torch"):
        for function in public_functions(ast.parse(file.read_text())):
            text = ast.get_docstring(function) or ""
            overrides = "backends" in file.parts and not text  # documented on the base class
            if takes_arrays(function) and not overrides and not re.search(r"\[[^\]]*\]", text):
                found.append(f"{relative(file)}:{function.lineno} {function.name}")
    assert not found, "\n".join(found)


def many_positional(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of functions with too many positional arguments.

    Commands and tests are excluded: Typer and pytest pass arguments by name.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            hints = (x.annotation for x in node.args.args if x.annotation)
            called = [*map(ast.unparse, node.decorator_list), *map(ast.unparse, hints)]
            command = any(".command(" in text or "typer." in text for text in called)
            by_name = node.name.startswith("test_") or command
        elif isinstance(node, ast.Lambda):
            by_name = False
        else:
            continue
        names = [x.arg for x in (*node.args.posonlyargs, *node.args.args)]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if count > POSITIONAL and not by_name:
            yield node.lineno, getattr(node, "name", "lambda")


def test_functions_take_at_most_7_positional_arguments():
    found = [
        f"{relative(file)}:{line} {name}"
        for file in sources(*PACKAGES, "tests", "tools", "examples")
        for line, name in many_positional(ast.parse(file.read_text()))
    ]
    assert not found, "\n".join(found)


def test_files_have_at_most_400_lines():
    files = [*sources(*PACKAGES, "tests"), *(ROOT / "examples").glob("*.py")]
    long = {
        relative(file): count for file in files if (count := file.read_text().count("\n")) > LINES
    }
    assert not long


def test_structure_rules_detect_violations():
    assert forbidden_imports("mc_core", "", ast.parse("def f():\n    import jax")) == {"jax"}
    assert forbidden_imports("mc_jax", "", ast.parse("from parity.cases import Case")) == {"parity"}
    for source in ("from test_a import b", "def f():\n    import test_a", "from x import test_a"):
        assert imported_tests(ast.parse(source), {"test_a"}), source
    assert not imported_tests(ast.parse("import jax.test_util"), {"test_a"})
    for source in (
        "if memory.kind == 'titans': pass",
        "x = name in ('grm', 'soup')",
        "isinstance(memory, DLAConfig | TitansConfig)",
        "{'linear': 1, 'swla': 2}[kind]",
        "match kind:\n    case 'dla': pass",
    ):
        assert list(branches(ast.parse(source))), source
    assert list(many_positional(ast.parse("def f(self, a, b, c, d, e, g, h, i): pass")))
    assert not list(many_positional(ast.parse("def f(self, a, b, c, d, e, g, h, *, i): pass")))
    (function,) = public_functions(ast.parse("def f(x: Array) -> int:\n    'Return it.'"))
    assert takes_arrays(function)
