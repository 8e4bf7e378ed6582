"""Conversion of weights: exact, verified and atomic; self-describing files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mc_jax
import mc_torch
from helpers.tiny_run import mc, write_config
from helpers.weight_cases import ALL, LAYERS, MODELS, draw, same_bits, torch_module
from mc_core import MCConfig, weights
from mc_core.pretrained import to_metadata
from parity.convert import TOLERANCE, convert, fixed_batch, outputs, relative_rms, shortened
from parity.files import SAFETENSORS, STATE_DICT, ModuleWeights
from parity.weights import jax_weights, load_torch, torch_weights
from train.config import load_config
from train.convert import read_run, run_format, write_run

WRONG = r"not written: the outputs of JAX and PyTorch differ by \d"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the configuration of a run."""
    return load_config(write_config(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Return an untrained run with random weights."""
    path = tmp_path_factory.mktemp("run") / "first"
    write_run(path, tiny, weights.to_jax(draw(tiny.model)))
    return path


@pytest.fixture
def saved(tmp_path):
    """Write drawn weights of a module of `ALL` to `<name>.safetensors`."""

    def save(name: str, dtype: str = "float32", **changes: np.ndarray) -> Path:
        path = tmp_path / f"{name}.safetensors"
        flat = {**draw(ALL[name], dtype), **changes}
        SAFETENSORS.write(path, ALL[name], flat)
        return path

    return save


def test_every_conversion_is_exact(run, tiny, tmp_path):
    form = run_format(tiny)
    a, b, c = tmp_path / "a.safetensors", tmp_path / "b.pt", tmp_path / "c"
    proofs = [
        convert(run, a, form, SAFETENSORS),
        convert(a, b, SAFETENSORS, STATE_DICT),
        convert(b, c, STATE_DICT, form, tiny.model),
    ]
    for proof in proofs:
        assert (proof.parameters, proof.dtype) == (13, "float32")
        assert proof.distance < 1e-13
    first, last = read_run(run), read_run(c)
    assert first.config == last.config == tiny.model
    assert same_bits(first.flat, last.flat)
    assert same_bits(load_file(a), draw(tiny.model))
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.pt", "c"]


def test_bfloat16_is_exact_through_files(saved, tmp_path):
    source = saved("tied", "bfloat16")
    there, back = tmp_path / "there.pt", tmp_path / "back.safetensors"
    assert convert(source, there, SAFETENSORS, STATE_DICT).dtype == "bfloat16"
    assert convert(there, back, STATE_DICT, SAFETENSORS).distance < TOLERANCE
    assert back.read_bytes() == source.read_bytes()


def test_files_follow_the_umask(saved):
    previous = os.umask(0o022)
    try:
        assert saved("linear").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(previous)


REPEATED = ("linear-head", "linear-learned", "linear-normalized", "swla")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in REPEATED else ())
        for name in [*sorted(LAYERS.keys() - {"titans"}), "free"]
    ],
)
def test_frameworks_agree_on_fixed_batch(name):
    given = ModuleWeights(ALL[name], draw(ALL[name]), "torch")
    ours, theirs = (outputs(ALL[name], given, framework) for framework in ("jax", "torch"))
    assert relative_rms(ours, theirs) < TOLERANCE / 10


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_element_affects_output(name):
    config = shortened(ALL[name])
    module = torch_module(config, torch.float64)
    load_torch(module, draw(config, "float64"))
    out = module(torch.from_numpy(fixed_batch(config)))
    (out * torch.from_numpy(np.random.default_rng(1).standard_normal(out.shape))).sum().backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None, key
        assert (parameter.grad != 0).all(), key


@pytest.mark.parametrize("direction", ["from jax", "from torch"])
def test_wrong_transform_leaves_no_file(run, tiny, saved, tmp_path, monkeypatch, direction):
    side = "by_jax_name" if direction == "from jax" else "by_torch_name"
    rows = getattr(weights, side)()
    for name, row in rows.items():
        if (
            row.jax == "blocks.#.mixer.q_proj.kernel"
        ):  # square, so that shapes do not reveal a transpose
            rows[name] = row._replace(transform=weights.identity)
    monkeypatch.setattr(weights, side, lambda: rows)
    source, read = (run, run_format(tiny)) if direction == "from jax" else (saved("tied"), None)
    target = tmp_path / "target.pt"
    with pytest.raises(ValueError, match=WRONG):
        convert(source, target, read or SAFETENSORS, STATE_DICT)
    assert [p for p in tmp_path.iterdir() if p != source] == []


def test_changed_value_leaves_no_file(saved, tmp_path):
    def write(path, config, flat):
        last = np.nextafter(flat["norm.scale"], np.inf, dtype=np.float32)
        STATE_DICT.write(path, config, {**flat, "norm.scale": last})

    target = tmp_path / "target.pt"
    with pytest.raises(ValueError, match=r"a different norm\.scale"):
        convert(saved("tied"), target, SAFETENSORS, STATE_DICT._replace(write=write))
    assert list(tmp_path.iterdir()) == [tmp_path / "tied.safetensors"]


def test_non_finite_weights_are_rejected(saved, tmp_path):
    source = saved("linear", **{"q_proj.weight": np.full((8, 8), np.nan, np.float32)})
    with pytest.raises(ValueError, match="differ by nan"):
        convert(source, tmp_path / "target.pt", SAFETENSORS, STATE_DICT)


def test_failed_write_leaves_no_file(saved, tmp_path):
    def write(path, config, flat):
        path.write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        convert(saved("linear"), tmp_path / "x.pt", SAFETENSORS, STATE_DICT._replace(write=write))
    assert list(tmp_path.iterdir()) == [tmp_path / "linear.safetensors"]


def test_target_is_written_after_verification(saved, tmp_path):
    target = tmp_path / "target.pt"

    def read(path):
        assert path != target
        assert not target.exists()
        return STATE_DICT.read(path)

    convert(saved("linear"), target, SAFETENSORS, STATE_DICT._replace(read=read))
    assert target.exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["linear", "tied"])
def test_file_loads_in_both_packages(saved, name, dtype):
    path, drawn = saved(name, dtype), draw(ALL[name], dtype)
    kind = "LanguageModel" if name in MODELS else "MemoryCachingLayer"
    ours = getattr(mc_jax, kind).from_pretrained(path)
    theirs = getattr(mc_torch, kind).from_pretrained(str(path))
    assert ours.config == theirs.config == ALL[name]
    assert same_bits(weights.to_torch(jax_weights(ours)), drawn)
    assert same_bits(torch_weights(theirs), drawn)


def test_conversion_to_another_dtype(saved):
    path, drawn = saved("linear", "bfloat16"), draw(LAYERS["linear"], "bfloat16")
    wide = {name: array.astype(np.float32) for name, array in drawn.items()}
    ours = mc_jax.MemoryCachingLayer.from_pretrained(path, param_dtype=jnp.float32)
    theirs = mc_torch.MemoryCachingLayer.from_pretrained(path, dtype=torch.float32)
    assert same_bits(weights.to_torch(jax_weights(ours)), wide)
    assert same_bits(torch_weights(theirs), wide)


def test_float64_requires_x64(saved):
    path = saved("linear", "float64")
    with pytest.raises(ValueError, match=r"float64: need jax\.enable_x64"):
        mc_jax.MemoryCachingLayer.from_pretrained(path)
    with jax.enable_x64(True):
        ours = mc_jax.MemoryCachingLayer.from_pretrained(path)
    assert same_bits(weights.to_torch(jax_weights(ours)), draw(LAYERS["linear"], "float64"))


@pytest.mark.parametrize("package", [mc_jax, mc_torch])
def test_mismatched_file_lists_all_errors(saved, tmp_path, package):
    path = saved("tied", **{"norm.scale": np.ones(3, np.float32), "extra": np.ones(1, np.float32)})
    flat = load_file(path)
    del flat["embed.weight"]
    save_file(flat, path, to_metadata(MODELS["tied"]))
    with pytest.raises(ValueError, match="do not match") as caught:
        package.LanguageModel.from_pretrained(path)
    for words in (
        f"{path}: weights do not match:",
        "missing embed.weight float32[11, 8]",
        "unexpected extra float32[1]",
        "must be norm.scale float32[8], is float32[3]",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("package", [mc_jax, mc_torch])
def test_invalid_files_are_rejected(saved, tmp_path, package):
    layer, plain, text = saved("linear"), tmp_path / "plain.safetensors", tmp_path / "text"
    save_file({"x": np.ones(2)}, plain)
    text.write_text("hello")
    load = package.LanguageModel.from_pretrained
    with pytest.raises(ValueError, match=r"MemoryCachingLayer\.from_pretrained"):
        load(layer)
    with pytest.raises(ValueError, match="no 'memory_caching' in its metadata"):
        load(plain)
    with pytest.raises(ValueError, match=f"{text}: "):
        load(text)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors")


LOAD = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
from {package} import LanguageModel
model = LanguageModel.from_pretrained({path!r})
{run}
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", ["mc_jax", "mc_torch"])
def test_each_package_loads_without_the_other_framework(saved, package):
    path = saved("tied")
    blocked, run = {
        "mc_jax": (
            ("torch", "parity", "mc_torch"),
            "import jax; print(jax.jit(lambda x: model(x))(jax.numpy.arange(11)[None]).sum())",
        ),
        "mc_torch": (
            ("jax", "jaxlib", "flax", "ml_dtypes", "parity", "mc_jax"),
            "import torch; print(model(torch.arange(11)[None]).sum().item())",
        ),
    }[package]
    code = LOAD.format(blocked=blocked, package=package, path=str(path), run=run)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = mc_torch.LanguageModel.from_pretrained(path)
    with torch.no_grad():
        total = theirs(torch.arange(11)[None]).sum().item()
    assert float(done.stdout) == pytest.approx(total, rel=1e-4)


def test_metadata_is_readable(saved):
    with safe_open(saved("tied"), framework="np") as file:
        metadata = file.metadata()
    description = json.loads(metadata["memory_caching"])
    assert description["version"] == 1
    assert description["config"]["layer"]["memory"]["kind"] == "linear"


def test_convert_command_prints_verification(run, tmp_path, monkeypatch, capsys):
    target = tmp_path / "model.safetensors"
    assert mc(monkeypatch, "convert", run, target) == 0
    out = capsys.readouterr().out
    assert f"{run} (run) -> {target} (safetensors): 13 parameters of float32, bit-equal;" in out
    assert "differ by " in out
    assert target.exists()


def test_bare_state_dict_requires_configuration(tiny, tmp_path):
    bare, target = tmp_path / "bare.pt", tmp_path / "model.safetensors"
    torch.save(mc_torch.LanguageModel(tiny.model).state_dict(), bare)
    with pytest.raises(ValueError, match="has no configuration: needs --config"):
        convert(bare, target, STATE_DICT, SAFETENSORS)
    convert(bare, target, STATE_DICT, SAFETENSORS, tiny.model)
    assert mc_jax.LanguageModel.from_pretrained(target).config == tiny.model


@pytest.mark.slow
def test_training_continues_from_converted_weights(tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path)
    config = load_config(path)
    flat = draw(config.model)
    flat["embed.weight"] *= 0  # uniform logits: a loss of log 256
    file, target = tmp_path / "flat.safetensors", tmp_path / "run"
    SAFETENSORS.write(file, config.model, flat)
    assert mc(monkeypatch, "convert", file, target, "--config", path) == 0
    rows = []

    def stop(curves, step, **values):
        rows.append(values)
        raise KeyboardInterrupt

    monkeypatch.setattr("train.session.Curves.write", stop)
    assert mc(monkeypatch, "train", path, f"run.directory={target}", "run.log_every=1") == 130
    assert "resuming from step 0 of 12" in capsys.readouterr().out
    assert rows[0]["loss"] == pytest.approx(np.log(256), abs=1e-5)


def test_convert_command_errors_are_one_line(run, tiny, saved, tmp_path, monkeypatch, capsys):
    yaml = write_config(tmp_path / "other")
    wider = yaml.with_name("wider.yaml")
    wider.write_text(f"base: {yaml.name}\nmodel: {{num_layers: 2}}\n")
    model, text, bad = tmp_path / "model.pt", tmp_path / "text.pt", tmp_path / "bad.pt"
    STATE_DICT.write(model, tiny.model, draw(tiny.model))
    half = tmp_path / "half.pt"
    STATE_DICT.write(half, tiny.model, draw(tiny.model, "bfloat16"))
    text.write_text("hello")
    flat = {**draw(tiny.model), "extra": np.ones(1, np.float32)}
    del flat["norm.scale"]
    STATE_DICT.write(bad, tiny.model, flat)
    layer, out, new = saved("linear"), tmp_path / "out.safetensors", tmp_path / "new"
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for words, message in {
        (tmp_path / "none.pt", out): "none.pt: no such file or folder",
        (tmp_path / "none", out): "none: no such file or folder",
        (tmp_path / "empty", out): "empty: no checkpoint found",
        (model, tmp_path / "out.onnx"): "out.onnx: unknown format; must be a run directory",
        (yaml, out): "tiny.yaml: unknown format",
        (model, out, "--from", "onnx"): "'onnx' is not one of 'run', 'safetensors', 'torch'",
        (model, tmp_path / "copy.pt"): "model.pt: already has the format torch; copy it",
        (model, layer): "linear.safetensors: exists; move it",
        (model, tmp_path / "no" / "x.safetensors"): "no: no such folder",
        (text, out): "text.pt: ",
        (model, out, "--from", "safetensors"): "model.pt: ",
        (model, new): "new: a new run needs --config",
        (model, new, "--config", wider): "another configuration: num_layers is 1, given 2",
        (layer, new, "--config", yaml): "another configuration: ",
        (half, new, "--config", yaml): "float32[256, 8], is bfloat16[256, 8]",
        (bad, out): "missing norm.scale float32[8] unexpected extra float32[1]",
    }.items():
        assert mc(monkeypatch, "convert", *words) == 2, words
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.startswith("mc: ")
        assert captured.err.count("\n") == 1
        assert captured.out == ""
        assert sorted(tmp_path.rglob("*")) == before


def test_convert_command_names_missing_framework(run, tmp_path):
    code = "import sys; sys.modules['torch'] = None; from train.__main__ import main; main()"
    command = [sys.executable, "-c", code, "convert", str(run), str(tmp_path / "x.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    message = "mc: torch is not installed: pip install 'memory-caching-jax[torch]'\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_verification_with_other_lengths():
    long, short = MCConfig(8, 2), MCConfig(8, 2, segment_size=16, chunk_size=8)
    given = ModuleWeights(long, draw(long), "torch")
    assert (outputs(long, given, "torch") == outputs(short, given, "torch")).all()
