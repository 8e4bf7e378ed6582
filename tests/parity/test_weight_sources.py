"""`LanguageModel.from_pretrained` from a run and from an exported folder, in both packages."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import mc_jax
import mc_torch
from helpers.tiny_run import untrained_run
from helpers.weight_cases import MODELS, draw, same_bits
from mc_core.weights import to_torch
from parity.weights import jax_weights, torch_weights
from train.checkpoint import load_run

both_packages = pytest.mark.parametrize("package", [mc_jax, mc_torch], ids=["jax", "torch"])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with a broken first checkpoint, a later one, and one that was not completed."""
    run = untrained_run(tmp_path_factory.mktemp("sources"), "model.mixers=[memory]")
    shutil.copytree(run / "checkpoints" / "0", run / "checkpoints" / "12")
    (run / "checkpoints" / "0" / "state" / "_METADATA").unlink()
    (run / "checkpoints" / "13.orbax-checkpoint-tmp").mkdir()
    return run


def weights(model: object) -> dict[str, np.ndarray]:
    """Return the parameters of a model in PyTorch's layouts."""
    is_jax = isinstance(model, mc_jax.LanguageModel)
    return to_torch(jax_weights(model)) if is_jax else torch_weights(model)


def write_export(folder: Path, name: str = "tied", prefix: str = "model.") -> Path:
    """Write the files of an exported model."""
    folder.mkdir()
    values = {"model_type": "memory_caching", "architectures": [], **MODELS[name].to_dict()}
    (folder / "config.json").write_text(json.dumps(values))
    flat = {prefix + key: array for key, array in draw(MODELS[name]).items()}
    save_file(flat, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_last_checkpoint_of_a_run_loads_in_both_packages(run):
    config, model, *_ = load_run(run)
    for package in (mc_jax, mc_torch):
        loaded = package.LanguageModel.from_pretrained(run)
        assert loaded.config == config.model
        assert same_bits(weights(loaded), to_torch(jax_weights(model)))


@pytest.mark.slow
def test_pytorch_loads_a_run_without_jax(run):
    code = (
        "import sys\nfor name in ('jax', 'flax', 'orbax'): sys.modules[name] = None\n"
        "import torch, mc_torch\n"
        f"model = mc_torch.LanguageModel.from_pretrained({str(run)!r})\n"
        "print(model(torch.arange(9)[None]).shape[-1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "256\n"), done.stderr


@both_packages
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_exported_folder_loads(tmp_path, package, prefix, caplog):
    folder = write_export(tmp_path / "export", prefix=prefix)
    loaded = package.LanguageModel.from_pretrained(folder)
    assert loaded.config == MODELS["tied"]
    assert same_bits(weights(loaded), draw(MODELS["tied"]))
    assert not caplog.messages


def test_unusable_folders_are_refused(run, tmp_path):
    load = mc_torch.LanguageModel.from_pretrained
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{tmp_path}: has neither checkpoints nor config.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match=f"{empty}: has no checkpoint: must be a run that has"):
        load(empty)
    with pytest.raises(ValueError, match=r"a LanguageModel: load it with LanguageModel\.from_"):
        mc_torch.MemoryCachingLayer.from_pretrained(run)
    folder = write_export(tmp_path / "export")
    config, file = folder / "config.json", folder / "model.safetensors"
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"export: has no model.safetensors: sharded and other"):
        load(folder)
    config.write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"config\.json is not of model_type 'memory_caching'"):
        load(folder)
    config.write_text('{"model_type": "memory_caching", "num_layers": 1}')
    with pytest.raises(ValueError, match="key 'vocab_size' is missing"):
        load(folder)


def test_missing_tensorstore_and_unknown_format_are_reported(run, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    load = mc_torch.LanguageModel.from_pretrained
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ValueError, match="reading a run needs tensorstore: pip install"):
        load(copy)
    (copy / "checkpoints" / "12" / "meta" / "metadata").write_text('{"config": {}}')
    with pytest.raises(ValueError, match=r"step 12 has an unknown format \(KeyError\('model'\)\)"):
        load(copy)
