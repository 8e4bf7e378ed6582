"""Checkpoints, evaluation and generation on other meshes than that of the training."""

import json

import jax
import numpy as np
import pytest

from helpers.tiny_run import TINY, mc, write_config
from parity.weights import jax_weights
from train.checkpoint import Checkpoints, load_run, load_state
from train.config import MeshConfig, load_config, parse_mesh
from train.convert import write_run
from train.mesh import open_mesh
from train.step import build
from train.tasks.task import load_task

ALL = "data=2,fsdp=2,heads=2"


@pytest.fixture
def run(tmp_path):
    """A run at step 0, trained on one device."""
    layer = TINY["model"]["layer"] | {"d_model": 16, "num_heads": 8, "aggregation": "ssc"}
    path = write_config(tmp_path, model=TINY["model"] | {"layer": layer})
    config = load_config(path, ["run.batch_size=8"])
    write_run(tmp_path / "run", config, weights(config))
    return tmp_path / "run"


def weights(config):
    from flax import nnx

    from mc_jax import LanguageModel

    return jax_weights(LanguageModel(config.model, rngs=nnx.Rngs(1)))


def test_checkpoints_move_between_meshes(run):
    """One device, eight rows, 2 × 2 × 2, one device: bit-equal, sharded when it is read."""
    config, _, first, step, meta = load_state(run)
    for number, words in enumerate(("data=8", ALL, "data=1"), step + 1):
        mesh = open_mesh(parse_mesh(words))
        _, _, state, found, _ = load_state(run, mesh)
        assert found == number - 1
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
            assert b.sharding.mesh == mesh
        kernel = state.params["blocks"][0]["mixer"]["q_proj"]["kernel"]
        parts = mesh.shape["fsdp"], mesh.shape["heads"]
        assert kernel.addressable_shards[0].data.shape == (16 // parts[0], 16 // parts[1])
        with Checkpoints(run, keep=1) as checkpoints:
            checkpoints.save(number, state, load_task(config).batches(), meta)


@pytest.mark.slow
def test_initial_state_does_not_depend_on_the_mesh(run):
    config = load_run(run)[0]
    one, *others = (
        build(config, open_mesh(parse_mesh(words)))[1] for words in ("data=1", "data=8", ALL)
    )
    for other in others:
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_evaluation_and_generation_on_a_mesh(run, monkeypatch, capsys):
    """Same score and same text as on one device."""
    found = []
    for words in ([], ["--mesh", ALL]):
        path = run.parent / "score.json"
        assert mc(monkeypatch, "evaluate", run, "--json", path, *words) == 0
        prompts = ["generate", run, "--prompt", "the memory", "--max-tokens", 12]
        capsys.readouterr()
        assert mc(monkeypatch, *prompts, *words) == 0
        found.append((json.loads(path.read_text())["bits_per_byte"], capsys.readouterr().out))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data", "--mesh data: must have the form data=2,fsdp=2,heads=2,context=1"),
        ("rows=2", "--mesh rows=2: must have the form"),
        ("heads=0", "--mesh heads=0: heads = 0: must be >= 1, or -1 for what is left"),
        ("data=9", "--mesh = 9: must be <= 8, the number of CPU devices that JAX sees"),
        ("heads=3", "mesh heads = 3: must be a divisor of num_heads = 8"),
    ],
)
def test_invalid_meshes_of_commands_are_refused(run, monkeypatch, capsys, words, message):
    assert mc(monkeypatch, "evaluate", run, "--mesh", words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_sizes_of_a_mesh_are_parsed():
    assert parse_mesh("heads=2") == MeshConfig(data=1, heads=2)
    assert parse_mesh("data=-1,fsdp=2") == MeshConfig(fsdp=2)
