"""`mc_jax` and `mc_torch` mirror each other: same files, public names and signatures.

The sources are parsed, not imported, so that framework base classes do not matter.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JAX, TORCH = ROOT / "mc_jax", ROOT / "mc_torch"
# Sequences split over devices and scanned blocks are JAX only.
JAX_ONLY_FILES = {
    "block_scan.py",
    "head_copies.py",
    "sharding.py",
    "width.py",
    "context.py",
    "context_attention.py",
    "context_memory.py",
    "context_reads.py",
    "context_scan.py",
}
JAX_ONLY_ARGUMENTS = {"split", "previous", "sum_reads", "base", "row_block"}
TORCH_ONLY_FOLDERS = {"hf"}  # Hugging Face transformers is for PyTorch
FILES = sorted(
    name for path in JAX.rglob("*.py") if (name := str(path.relative_to(JAX))) not in JAX_ONLY_FILES
)

# Names that only `mc_torch` has, by file.
TORCH_ONLY = {
    # JAX has jax.checkpoint, jax.tree.map, scans over stacked arrays and maxima with numbers.
    "numerics.py": {
        "autocasts",
        "compute_dtype",
        "is_batched",
        "is_transformed",
        "maximum",
        "remat",
        "take_along",
        "tree_map",
        "unstack",
        "unfold",
    },
    # PyTorch tools replace linear maps and embeddings, and FSDP only hooks `forward`.
    "modules.py": {"Hooked", "call_hooked", "embedding_matrix", "project"},
    # Index tensors of a plan are on a device and are created outside of compiled graphs.
    "chunk_layout.py": {"TokenIndex", "TensorPlan", "make_plan"},
    "pretrained.py": {"Flat"},
}
JAX_ONLY = {
    "attention.py": {"attend_split"},
    "chunk_layout.py": {"gather_positions"},
    "modules.py": {"Head"},
    "numerics.py": {"SAVE_POLICY", "SUM_BLOCK", "save_for_backward"},
    # Host memory is a device in PyTorch and a memory space in JAX.
    "reads.py": {"SumReads"},
    "offload.py": {"HOST", "DEVICE", "HOST_KIND", "compute_on"},
}
RENAMED = {"__call__": "forward"}
# Constructor arguments: JAX has `rngs`, names of axes, and separate dtypes of compute and
# parameters.
CONSTRUCTION = {"rngs", "param_dtype", "axes", "device", "dtype"}
CONSTRUCTORS = {"__init__", "from_pretrained", "initial_memory", "Linear"}


def public(name):
    return not name.startswith("_") or name in ("__init__", "__call__")


def signature(function):
    """Return names and kinds of arguments, and which have a default."""
    a = function.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [False] * (len(positional) - len(a.defaults)) + [True] * len(a.defaults)
    arguments = [(x.arg, "positional", d) for x, d in zip(positional, defaults, strict=True)]
    arguments += [(x.arg, "all", False) for x in (a.vararg, a.kwarg) if x]
    arguments += [
        (x.arg, "keyword", d is not None) for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    arguments = [
        x for x in arguments if x[1:] != ("keyword", True) or x[0] not in JAX_ONLY_ARGUMENTS
    ]
    if function.name in CONSTRUCTORS:
        arguments = [x for x in arguments if x[0] not in CONSTRUCTION]
    return arguments


def members(body):
    """Return the public names of a module or class, with signatures or members."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef) and public(node.name):
            found[RENAMED.get(node.name, node.name)] = signature(node)
        elif isinstance(node, ast.ClassDef) and public(node.name):
            found[node.name] = members(node.body)
        elif isinstance(node, ast.AnnAssign) and public(node.target.id):
            found[node.target.id] = "field"
        elif isinstance(node, ast.Assign):
            found |= {x.id: "value" for x in node.targets if public(x.id)}
    return found


def read(package, file):
    return ast.parse((package / file).read_text())


def test_packages_have_the_same_files():
    files = [path.relative_to(TORCH) for path in TORCH.rglob("*.py")]
    assert sorted(str(file) for file in files if file.parts[0] not in TORCH_ONLY_FOLDERS) == FILES


@pytest.mark.parametrize("file", FILES)
def test_packages_have_the_same_names_and_signatures(file):
    jax, torch = (members(read(package, file).body) for package in (JAX, TORCH))
    extra = torch.keys() - jax.keys(), jax.keys() - torch.keys()
    assert extra == (TORCH_ONLY.get(file, set()), JAX_ONLY.get(file, set()))
    both = [name for name in jax if name in torch]
    assert both == [name for name in torch if name in jax], "different order"
    for name in both:
        if (file, name) == ("modules.py", "Linear"):  # a function that makes an `nn.Linear`
            jax[name] = [x for x in jax[name]["__init__"] if x[0] != "self"]
        assert torch[name] == jax[name], name
        if isinstance(jax[name], dict):
            assert list(torch[name]) == list(jax[name]), f"{name}: different order"


@pytest.mark.parametrize("file", FILES)
def test_packages_have_the_same_einsums(file):
    """Einsum specifications are the same in both packages."""

    def specs(package):
        strings = (x.value for x in ast.walk(read(package, file)) if isinstance(x, ast.Constant))
        return {x for x in strings if isinstance(x, str) and "->" in x and " " not in x}

    renamed = {"btd,dh->bth": "btd,hd->bth"}  # a weight is [out, in]
    # JAX only: PyTorch has built-in functions for the head, running sums and attention (that of JAX
    # computes in float32). The elementwise product and the selection of level weights are einsums
    # because XLA is faster.
    jax_only = {
        "btd,ds->bts",
        "ij,...jk->...ik",
        "...c,...ci->...ci",
        "...cl,csl->...cs",
        "bthk,bshk->bhts",
        "bhts,bshv->bthv",
    }
    assert specs(TORCH) == {renamed.get(spec, spec) for spec in specs(JAX) - jax_only}


def test_packages_export_the_same_names():
    def exported(package):
        (names,) = (
            ast.literal_eval(node.value)
            for node in read(package, "__init__.py").body
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
        )
        return names

    assert exported(TORCH) == exported(JAX)
