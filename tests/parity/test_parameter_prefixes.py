"""Files of parameters with name prefixes of wrappers and training loops."""

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.optim.swa_utils import AveragedModel

import mc_jax
import mc_torch
from helpers.tiny_run import write_config
from helpers.weight_cases import ALL, draw, same_bits, torch_module
from mc_core.prefixes import plain_names
from mc_core.pretrained import to_metadata
from mc_core.weights import to_torch
from parity.community import PARAMETERS, community_format
from parity.convert import convert
from parity.files import SAFETENSORS, STATE_DICT
from parity.weights import jax_weights, load_torch, to_tensor, torch_weights
from train.__main__ import main
from train.cli.parity_case import own_case
from train.config import load_config

MODEL = ALL["hybrid"]
NAMES = tuple(draw(MODEL))
BLOCKS = ("blocks.0.", "blocks.2.")


def before_all(prefix: str) -> Any:
    return lambda name: prefix + name


def in_blocks(wrapper: str) -> Any:
    return lambda name: name[:9] + wrapper + name[9:] if name.startswith(BLOCKS) else name


RENAMED = {
    "torch.compile": (before_all("_orig_mod."), "'_orig_mod.'"),
    "DistributedDataParallel": (before_all("module."), "'module.'"),
    "compiled, then distributed": (before_all("module._orig_mod."), "'module.', '_orig_mod.'"),
    "distributed, then compiled": (before_all("_orig_mod.module."), "'_orig_mod.', 'module.'"),
    "Lightning": (before_all("model."), "'model.'"),
    "Lightning, compiled": (before_all("model._orig_mod."), "'_orig_mod.', 'model.'"),
    "PEFT": (before_all("base_model.model."), "'base_model.model.'"),
    "a Sequential": (before_all("0."), "'0.'"),
    "compiled blocks": (in_blocks("_orig_mod."), "'_orig_mod.'"),
    "checkpointed blocks": (
        in_blocks("_checkpoint_wrapped_module."),
        "'_checkpoint_wrapped_module.'",
    ),
    "distributed mixers": (lambda name: name.replace(".mixer.", ".mixer.module."), "'module.'"),
    "several": (
        lambda name: "module." + in_blocks("_fsdp_wrapped_module._orig_mod.")(name),
        "'module.', '_fsdp_wrapped_module.', '_orig_mod.'",
    ),
}
every_renaming = pytest.mark.parametrize("kind", RENAMED)


def renamed(kind: str) -> dict[str, np.ndarray]:
    return {RENAMED[kind][0](name): array for name, array in draw(MODEL).items()}


def save_pt(path: Path, flat: dict[str, np.ndarray], place: str = "", **others: Any) -> Path:
    tensors = {name: to_tensor(array) for name, array in flat.items()}
    torch.save({place: tensors, **others} if place else tensors, path)
    return path


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    return caplog.messages


@every_renaming
def test_state_dict_prefixes_are_removed(kind, tmp_path, caplog):
    path = save_pt(tmp_path / "model.pt", renamed(kind))
    assert same_bits(STATE_DICT.read(path).flat, draw(MODEL))
    assert lines(caplog) == [f"{path}: removed {RENAMED[kind][1]} from the names of parameters"]


@pytest.mark.parametrize("kind", ["torch.compile", "several", "Lightning"])
def test_both_packages_load_files_of_wrapped_modules(kind, tmp_path, caplog):
    path = tmp_path / "model.safetensors"
    save_file(renamed(kind), path, to_metadata(MODEL))
    line = f"{path}: removed {RENAMED[kind][1]} from the names of parameters"
    ours, theirs = (package.LanguageModel.from_pretrained(path) for package in (mc_jax, mc_torch))
    assert same_bits(to_torch(jax_weights(ours)), draw(MODEL))
    assert same_bits(torch_weights(theirs), draw(MODEL))
    assert same_bits(SAFETENSORS.read(path).flat, draw(MODEL))
    assert lines(caplog) == [line] * 3


def test_plain_names_are_not_logged(tmp_path, caplog):
    assert plain_names(NAMES) == ({name: name for name in NAMES}, ())
    layer = draw(ALL["titans"])
    assert same_bits(STATE_DICT.read(save_pt(tmp_path / "layer.pt", layer)).flat, layer)
    assert lines(caplog) == []


def test_pytorch_wrappers_are_removed(tmp_path):
    def saved(module: Any) -> Any:
        torch.save(module.state_dict(), tmp_path / "model.pt")
        return STATE_DICT.read(tmp_path / "model.pt").flat

    model = torch_module(MODEL)
    load_torch(model, draw(MODEL))
    for wrapped in (
        torch.compile(model, backend="eager"),
        torch.nn.DataParallel(torch.compile(model, backend="eager")),
        AveragedModel(model),
        torch.nn.Sequential(model),
    ):
        assert same_bits(saved(wrapped), draw(MODEL)), type(wrapped)
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    assert any("_orig_mod" in name for name in model.state_dict())
    assert same_bits(saved(model), draw(MODEL))


@pytest.mark.parametrize("place", ["state_dict", "model", "model_state_dict", "module"])
def test_state_dict_in_training_checkpoint(place, tmp_path, caplog):
    others = {"optimizer": {"state": {}, "param_groups": []}, "step": 7, "config": {"lr": 0.1}}
    path = save_pt(tmp_path / "last.pt", renamed("torch.compile"), place, **others)
    read = STATE_DICT.read(path)
    assert read.config is None
    assert same_bits(read.flat, draw(MODEL))
    assert lines(caplog) == [
        f"{path}: read only the parameters under {place!r}",
        f"{path}: removed '_orig_mod.' from the names of parameters",
    ]


def test_prefixed_file_keeps_configuration(tmp_path):
    path = tmp_path / "model.pt"
    STATE_DICT.write(path, MODEL, renamed("torch.compile"))
    assert STATE_DICT.read(path).config == MODEL
    assert same_bits(STATE_DICT.read(path).flat, draw(MODEL))


def test_missing_or_ambiguous_state_dict_is_rejected(tmp_path):
    path, flat = tmp_path / "model.pt", draw(MODEL)
    tensors = {name: to_tensor(array) for name, array in flat.items()}
    for loaded, message in (
        ({"state_dict": tensors, "model": tensors}, "several state_dicts, under 'state_dict', 'mo"),
        (
            {"step": 1},
            "contains no state_dict: must have one at the top level or under 'state_dict', ",
        ),
        ({"model": {}}, "contains no state_dict"),
        ([1], "contains no state_dict"),
        ({"state_dict": tensors, "module": "LanguageModel"}, "key 'version' is missing"),
        ({"state_dict": tensors, "version": 2, "module": "x", "config": {}}, "has version 2"),
    ):
        torch.save(loaded, path)
        with pytest.raises(ValueError, match=message):
            STATE_DICT.read(path)


def conversion_error(tmp_path: Path, flat: dict[str, np.ndarray]) -> str:
    """Return the error message of a failed conversion."""
    target = tmp_path / "target.safetensors"
    with pytest.raises(ValueError, match="do not match") as caught:
        convert(save_pt(tmp_path / "model.pt", flat), target, STATE_DICT, SAFETENSORS, MODEL)
    assert not target.exists()
    return str(caught.value)


def test_prefixed_mismatch_is_listed_once(tmp_path):
    flat = renamed("compiled, then distributed")
    flat["module._orig_mod.norm.bias"] = flat.pop("module._orig_mod.norm.scale")
    faults = conversion_error(tmp_path, flat).splitlines()[1:]
    assert faults == ["  missing norm.scale float32[8]", "  unexpected norm.bias float32[8]"]


def test_partial_wrapper_prefix_is_rejected(tmp_path):
    flat = draw(MODEL)
    flat["module.norm.scale"] = flat.pop("norm.scale")
    assert "unexpected module.norm.scale" in conversion_error(tmp_path, flat)
    both = draw(MODEL) | {"_orig_mod.norm.scale": np.zeros(8, np.float32)}
    assert conversion_error(tmp_path, both).splitlines()[1:] == [
        "  unexpected _orig_mod.norm.scale float32[8]"
    ]
    inside = draw(MODEL)
    inside["blocks.0._orig_mod.mixer_norm.scale"] = inside.pop("blocks.0.mixer_norm.scale")
    assert "unexpected blocks.0._orig_mod.mixer_norm.scale" in conversion_error(tmp_path, inside)


def test_prefix_is_removed_only_if_all_names_are_known(tmp_path, caplog):
    flat = {f"encoder.{name}": array for name, array in draw(MODEL).items()}
    flat["encoder.pooler.weight"] = np.zeros((8, 8), np.float32)
    assert "unexpected encoder.norm.scale" in conversion_error(tmp_path, flat)
    assert lines(caplog) == []
    # Names of a layer in a model are known and are not shortened to those of a layer.
    block = [name for name in NAMES if name.startswith("blocks.0.mixer.")]
    assert plain_names(block) == ({name: name for name in block}, ())


def test_wrapped_community_layers(tmp_path, monkeypatch):
    monkeypatch.setattr("parity.community.find_spec", lambda name: None)
    fields = {"d_model": 8, "num_heads": 2, "aggregation": "grm", "segmentation": "constant"}
    fields |= {"segment_size": 4, "state_init_mode": "checkpoint", "ssc_top_k": 2}
    fields |= {"use_q_as_u": False, "softmax_temperature": 1.0, "detach_cached_states": False}
    fields |= {"detach_cached_context": False, "allow_output_mixture_fallback": False}
    fields |= {"backend": "linear", "swla": {}, "dla": {}, "titans": {}}
    flat = {f"_orig_mod.{name}": np.ones((8, 8), np.float32) for name in PARAMETERS}
    path = save_pt(tmp_path / "layer.pt", flat, "state_dict", config=fields)
    notes: list[str] = []
    read = community_format(notes.append).read(path)
    assert sorted(read.flat) == sorted(PARAMETERS.values())


def test_commands_read_wrapped_models(tmp_path, monkeypatch, capsys):
    yaml = write_config(tmp_path)
    config = load_config(yaml).model
    flat = {f"module._orig_mod.{name}": array for name, array in draw(config).items()}
    source, target = (
        save_pt(tmp_path / "last.pt", flat, "model", step=3),
        tmp_path / "m.safetensors",
    )
    line = f"mc: {source}: removed 'module.', '_orig_mod.' from the names of parameters\n"
    log = logging.getLogger("mc_core")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    words = ["mc", "convert", source, target, "--config", yaml]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert not stop.value.code
    assert "13 parameters of float32, bit-equal" in captured.out
    place = f"mc: {source}: read only the parameters under 'model'\n"
    assert captured.err == place + line
    assert same_bits(SAFETENSORS.read(target).flat, draw(config))

    case, weights = own_case(yaml, source, "float64", None)
    assert weights is not None
    assert case.config == config
    assert weights.keys() == own_case(None, target, "float64", None)[1].keys()
