"""Train a byte-level Titans with gated residual memory in plain PyTorch, on Python's own source.

python examples/train_torch.py --steps 100
"""

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from mc_core import MCConfig, ModelConfig, TitansConfig
from mc_torch import LanguageModel

CONFIG = ModelConfig(
    vocab_size=256,
    num_layers=2,
    layer=MCConfig(
        d_model=128,
        num_heads=4,
        memory=TitansConfig(expansion=1),
        aggregation="grm",
        segment_size=128,
        chunk_size=32,
        conv_width=4,
    ),
)


def read_text() -> torch.Tensor:
    """Return the concatenated source files of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "site-packages", "dist-packages"}
    files = (f for f in sorted(root.rglob("*.py")) if not skipped & set(f.relative_to(root).parts))
    return torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)


def main() -> None:
    """Train, and print the loss in bits per byte."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    text = read_text()
    model = LanguageModel(CONFIG, device=args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.1)
    warmup = min(20, args.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup)
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(text):,} bytes, {parameters:,} parameters, {args.device}")

    start = time.perf_counter()
    for step in range(1, args.steps + 1):
        places = torch.randint(len(text) - args.window, (args.batch, 1))
        window = text[places + torch.arange(args.window + 1)].long().to(args.device)
        logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == args.steps:
            seconds = time.perf_counter() - start
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits per byte, {seconds:.0f} s")


if __name__ == "__main__":
    main()
