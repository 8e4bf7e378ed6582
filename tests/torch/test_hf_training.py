"""Training with transformers: Trainer, its checkpoints, LoRA, and several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from helpers.hf_models import draw_ids, hf_model

ROOT = Path(__file__).parents[2]
IDS = draw_ids(2, 11)
ROWS = [{"input_ids": row, "labels": row} for row in draw_ids(4, 12)] * 4
# transformers renames arguments, and peft uses the old names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def train(folder: Path, steps: int = 4, resume: str | None = None, **options: object):
    """Return the trainer after `steps` steps of two microbatches, in bfloat16."""
    arguments = {
        "learning_rate": 0.03,
        "lr_scheduler_type": "constant",
        "bf16": True,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    set_seed(0)
    trainer = Trainer(
        model=hf_model(),
        args=TrainingArguments(str(folder), **arguments | options),
        train_dataset=ROWS,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.model.state_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer that has not been interrupted."""
    return train(tmp_path_factory.mktemp("trained"))


def test_trainer_learns_and_resumes_exactly(trained, tmp_path):
    losses = [row["loss"] for row in trained.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    train(tmp_path, steps=2)
    resumed = train(tmp_path, resume=str(tmp_path / "checkpoint-2"))
    for name, expected in weights(trained).items():
        assert torch.equal(weights(resumed)[name], expected), name


def test_gradient_checkpointing_and_accumulation_do_not_change_training(tmp_path):
    options = {"bf16": False, "optim": "sgd", "steps": 2}
    whole = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
    plain = train(tmp_path, **options, **whole)
    other = train(tmp_path, **options, gradient_checkpointing=True)
    for name, expected in weights(plain).items():
        torch.testing.assert_close(weights(other)[name], expected, rtol=1e-4, atol=1e-6)
    assert other.model.gradient_checkpointing


def test_lora_on_all_projections():
    model = hf_model()
    before = model(IDS).logits
    names = ["q_proj", "k_proj", "v_proj", "u_proj", "out_proj", "gate_proj", "up_proj"]
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=2,
            target_modules=[*names, "down_proj"],
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        ),
    )
    out = adapted(input_ids=IDS, labels=IDS)
    assert not torch.allclose(out.logits, before)
    out.loss.backward()
    trainable = {name for name, x in adapted.named_parameters() if x.requires_grad}
    assert len(trainable) == 2 * (5 + 4 + 2 * 3)  # A and B of the projections of both blocks
    assert all(x.grad is not None for x in adapted.parameters() if x.requires_grad)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    new = adapted.generate(input_ids=IDS, **options)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, out.logits)
    assert torch.equal(merged.generate(IDS, **options), new)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(strategy, tmp_path):
    """DDP and FSDP with Trainer and accelerate: same weights as one process, saved in one file."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests" / "helpers" / "hf_processes.py")
    alone = [sys.executable, script, "alone", str(tmp_path / "alone")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    together = [*launch, script, strategy, str(tmp_path / "together")]
    for command in (alone, together):
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    one, two = (torch.load(tmp_path / name / "weights.pt") for name in ("alone", "together"))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-4, atol=1e-5)
