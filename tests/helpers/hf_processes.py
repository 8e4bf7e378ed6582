"""Training with `Trainer` in one process or several: `python hf_processes.py STRATEGY FOLDER`."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from helpers.hf_models import draw_ids, hf_model

STRATEGIES = {
    "alone": {},
    "ddp": {"ddp_backend": "gloo"},
    "fsdp": {
        "ddp_backend": "gloo",
        "fsdp": True,
        "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"},
    },
}


def main(strategy: str, folder: Path) -> None:
    """Train, save the model, and write its parameters to `weights.pt`."""
    alone = strategy == "alone"
    arguments = TrainingArguments(
        str(folder),
        learning_rate=0.01,
        max_steps=3,
        per_device_train_batch_size=4 if alone else 2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **STRATEGIES[strategy],
    )
    rows = [{"input_ids": row, "labels": row} for row in draw_ids(12, 12)]
    # In the order of the rows, so that both processes together see the batches of one.
    trainer = Trainer(model=hf_model(), args=arguments, train_dataset=rows)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        torch.save(load_file(folder / "model.safetensors"), folder / "weights.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
