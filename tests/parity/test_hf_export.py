"""`mc export`: verified, atomic, and what transformers loads is the run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mc_torch.hf
from helpers.tiny_run import fails, mc, untrained_run
from helpers.tokenizer_files import words
from helpers.weight_cases import same_bits
from mc_core.weights import to_torch
from parity import hf
from parity.carried_code import carried_files, rewrite
from parity.weights import jax_weights
from train.checkpoint import load_run
from train.data.hf_tokenizer import byte_characters, tokenizer_files


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained run of a byte-level model, in a folder of its own."""
    return untrained_run(tmp_path_factory.mktemp("hf"), "model.mixers=[memory]")


@pytest.fixture(scope="module")
def folder(run):
    """The exported run."""
    with pytest.MonkeyPatch.context() as patch:
        assert mc(patch, "export", run, run.parent / "folder") == 0
    return run.parent / "folder"


def test_folder_loads_as_the_run(run, folder):
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    names |= {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, source, *_ = load_run(run)
    assert isinstance(model, mc_torch.hf.MemoryCachingForCausalLM)
    assert model.config.to_model_config() == config.model
    assert model.generation_config.pad_token_id == 0
    for name, array in to_torch(jax_weights(source)).items():
        assert torch.equal(model.model.get_parameter(name), torch.tensor(array)), name
    plain = mc_torch.LanguageModel.from_pretrained(folder)
    ids = torch.arange(12)[None]
    assert torch.equal(plain(ids), model(ids).logits)
    card = (folder / "README.md").read_text()
    assert "| optimizer steps | 0 |" in card
    assert "trust_remote_code" not in card


def test_overrides_change_the_exported_configuration(run, tmp_path, monkeypatch):
    changed = "model.layer.aggregation=mean"
    assert mc(monkeypatch, "export", run, tmp_path / "folder", changed) == 0
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["layer"]["aggregation"] == "mean"
    assert changed in (tmp_path / "folder" / "README.md").read_text()


def test_greedy_text_equals_mc_generate(run, folder, monkeypatch, capsys):
    capsys.readouterr()
    assert mc(monkeypatch, "generate", run, "--prompt", "the mémoire", "--max-tokens", "24") == 0
    expected = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("the mémoire", return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=24, do_sample=False)[
        0, inputs.input_ids.shape[1] :
    ]
    assert tokenizer.decode(new) == expected


def test_byte_tokenizer_reads_and_writes_all_text(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sorted(byte_characters()) == sorted(set(byte_characters()))
    text = "".join(map(chr, range(0x250))) + "Āā \n€ 漢字 😀\r\n"  # U+0100 names byte 0
    ids = tokenizer(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    batch = tokenizer(["a", "abc"], padding=True, padding_side="left", return_tensors="np")
    assert batch["input_ids"].tolist() == [[0, 0, 97], [97, 98, 99]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_tokenizer_file_encodes_as_in_training(tokenizer, tmp_path):
    """An unchanged file is copied; a post-processor, which training ignores, is removed."""
    files, padding, prefix = tokenizer_files(tokenizer, 4, "memory")
    assert files["tokenizer.json"] == Path(tokenizer).read_bytes()
    assert padding is None
    assert prefix == 2
    data = json.loads(Path(tokenizer).read_text())
    data["added_tokens"] = [
        {"id": 3, "content": "reads", "special": True, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False}
    ]
    first, text = {"id": "reads", "type_id": 0}, {"id": "A", "type_id": 0}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": first}, {"Sequence": text}],
        "pair": [{"Sequence": text}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"reads": {"id": "reads", "ids": [3], "tokens": ["reads"]}},
    }
    Path(tokenizer).write_text(json.dumps(data))
    files, padding, _ = tokenizer_files(tokenizer, 4)
    assert padding == 3
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("the memory reads the")["input_ids"] == [1, 2, 3, 1]
    assert loaded.pad_token_id == loaded.eos_token_id == 3


def test_end_of_text_token_separates_documents(tmp_path):
    words("<pad>", "<|endoftext|>", "the").save(str(tmp_path / "words.json"))
    files, padding, prefix = tokenizer_files(str(tmp_path / "words.json"), 4)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token == "<|endoftext|>"
    assert loaded.eos_token_id == prefix
    assert loaded.pad_token_id == padding


def test_conversion_back_is_exact(run, folder, tmp_path, monkeypatch, capsys):
    """Also of a folder that transformers saved, in bfloat16 and in several files."""
    assert mc(monkeypatch, "convert", run, tmp_path / "a.safetensors") == 0
    assert mc(monkeypatch, "convert", folder, tmp_path / "b.safetensors") == 0
    assert "(hf)" in capsys.readouterr().out
    with (
        safe_open(tmp_path / "a.safetensors", "np") as one,
        safe_open(tmp_path / "b.safetensors", "np") as other,
    ):
        assert one.metadata() == other.metadata()
        flats = [{k: f.get_tensor(k) for k in f.keys()} for f in (one, other)]  # noqa: SIM118
        assert same_bits(*flats)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="2KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert mc(monkeypatch, "convert", tmp_path / "saved", tmp_path / "c.safetensors") == 0
    flat = load_file(tmp_path / "c.safetensors")
    assert flat.keys() == {name for name, _ in model.model.named_parameters()}
    assert {array.dtype.name for array in flat.values()} == {"bfloat16"}


def test_no_folder_unless_logits_agree(run, tmp_path, monkeypatch, capsys):
    """A loader that changes the model is noticed, and nothing is written."""
    real = hf.load

    def wrong(path, config=None, dtype="auto"):
        model = real(path, config, dtype)
        if config is not None:
            model.model.norm.scale.data[0] += 1e-6
        return model

    monkeypatch.setattr(hf, "load", wrong)
    assert mc(monkeypatch, "export", run, tmp_path / "folder") == 2
    assert "not written: the outputs of JAX and PyTorch differ by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_wrong_folders_are_refused(run, folder, tmp_path, monkeypatch, capsys):
    config = run.parent / "tiny.yaml"
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)

    def refused(source, message):
        out = tmp_path / "x.safetensors"
        fails(config, monkeypatch, capsys, message, "convert", source, out)
        assert not out.exists()

    (broken / "model.safetensors").write_bytes(b"none")
    refused(broken, f"{broken}: ")
    (broken / "config.json").write_text('{"model_type": "llama"}')
    refused(broken, f"{broken}: model_type = 'llama': must be 'memory_caching'")
    (broken / "config.json").unlink()
    (broken / "adapter_config.json").write_text("{}")
    refused(broken, "has an adapter only: merge it")
    fails(config, monkeypatch, capsys, f"{folder}: exists", "export", run, folder)
    fails(config, monkeypatch, capsys, "no checkpoint found", "export", folder, tmp_path / "y")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in [name for name in sys.modules if name.startswith("mc_torch.hf")]:
        monkeypatch.delitem(sys.modules, name)
    message = "transformers is not installed: pip install"
    fails(config, monkeypatch, capsys, message, "export", run, tmp_path / "y")


def test_carried_code_has_no_imports_of_the_packages():
    files = carried_files()
    assert {"mc_torch_hf_modeling.py", "mc_core_config.py"} <= files.keys()
    for source in files.values():
        assert "from mc_" not in source
        assert "import mc_torch" not in source.replace("from . import mc_torch", "")
    code = "def f():\n    from mc_core import checks, MCConfig as C\n"
    expected = "def f():\n    from . import mc_core_checks as checks\n"
    expected += "    from .mc_core import MCConfig as C\n"
    assert rewrite(code) == (expected, ["mc_core.checks", "mc_core"])
    with pytest.raises(ValueError, match="line 1: must be"):
        rewrite("import mc_core.config\n")


WITHOUT_PACKAGES = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mc_core", "mc_torch", "mc_jax", "parity", "train"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("the memory", return_tensors="pt")
np.save(output, model.generate(**inputs, max_new_tokens=8, do_sample=False))
"""


@pytest.mark.slow
def test_folder_with_code_runs_without_the_packages(run, folder, tmp_path, monkeypatch):
    carried = tmp_path / "carried"
    assert mc(monkeypatch, "export", run, carried, "--with-code") == 0
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    output = tmp_path / "ids.npy"
    command = [sys.executable, "-c", WITHOUT_PACKAGES, str(carried), str(output)]
    subprocess.run(command, check=True, cwd=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)("the memory", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False).numpy()
    np.testing.assert_array_equal(np.load(output), expected)
    card = (carried / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert (
        "--model_args pretrained=FOLDER,trust_remote_code=True,dtype=float32,prefix_token_id=10"
        in card
    )
