"""Fine-tune a model with the Trainer of Hugging Face transformers, on Python's own source.

mc export runs/demo demo-hf
python examples/finetune_hf.py demo-hf finetuned --steps 100
"""

import argparse
import math
import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import mc_torch.hf  # noqa: F401 - registers the model


def read_text(characters: int = 2_000_000) -> str:
    """Return the start of the concatenated source files of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "site-packages", "dist-packages"}
    files = (f for f in sorted(root.rglob("*.py")) if not skipped & set(f.relative_to(root).parts))
    return "\n".join(file.read_text(errors="replace") for file in files)[:characters]


def main() -> None:
    """Train, print the validation loss before and after, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder of mc export")
    parser.add_argument("target", help="folder to write")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.source)
    model = AutoModelForCausalLM.from_pretrained(args.source)
    ids = torch.tensor(tokenizer(read_text(), verbose=False)["input_ids"])
    windows = ids[: len(ids) // args.window * args.window].reshape(-1, args.window)
    rows = [{"input_ids": row, "labels": row} for row in windows]
    arguments = TrainingArguments(
        args.target,
        max_steps=args.steps,
        learning_rate=3e-4,
        per_device_train_batch_size=4,
        bf16=torch.cuda.is_available(),
        save_steps=args.steps,
        logging_steps=10,
        report_to=[],
    )
    trainer = Trainer(model, arguments, train_dataset=rows[:-64], eval_dataset=rows[-64:])
    print(f"before: {trainer.evaluate()['eval_loss'] / math.log(2):.3f} bits per token")
    trainer.train()
    print(f"after: {trainer.evaluate()['eval_loss'] / math.log(2):.3f} bits per token")
    trainer.save_model()
    tokenizer.save_pretrained(args.target)


if __name__ == "__main__":
    main()
