"""Train a byte-level Titans with gated residual memory in plain PyTorch, on Python's own source.

python examples/train_torch.py --steps 100
torchrun --nproc-per-node=2 examples/train_torch.py --steps 100   # the same batches, shared
mc convert runs/torch/checkpoint.pt model.safetensors

The same command resumes from the last checkpoint, exactly: the batch of a step depends on the step
alone, and the checkpoint has the state of the optimizer.
"""

import argparse
import math
import os
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mc_core import MCConfig, ModelConfig, TitansConfig
from mc_core.pretrained import describe
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


def draw_windows(text: torch.Tensor, step: int, batch: int, window: int) -> torch.Tensor:
    """Return the windows of a step, ids [b, window + 1]; a process gets its share of the rows."""
    rng = torch.Generator().manual_seed(step)
    places = torch.randint(len(text) - window, (batch, 1), generator=rng)
    if dist.is_initialized():
        places = places[dist.get_rank() :: dist.get_world_size()]
    return text[places + torch.arange(window + 1)].long()


class Loss(nn.Module):
    """Mean cross-entropy of the next tokens; the logits of all tokens never exist at once."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        """Return the loss of ids [b, window + 1], in nats per token."""
        return self.model.score(window[:, :-1], window[:, 1:]).losses.mean()


def save(path: Path, step: int, model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint atomically; `mc convert` reads the configuration and the parameters."""
    training = {"step": step, "optimizer": optimizer.state_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    state = model.state_dict()
    torch.save({**describe(CONFIG), "state_dict": state, "training": training}, temporary)
    temporary.replace(path)


def load(path: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> int:
    """Restore a checkpoint, if there is one, and return its step."""
    if not path.exists():
        return 0
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(saved["state_dict"])
    optimizer.load_state_dict(saved["training"]["optimizer"])
    return saved["training"]["step"]


def main() -> None:
    """Train, and print the loss in bits per byte."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="windows per step, of all processes")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/torch/checkpoint.pt"))
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--bfloat16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    rank = 0
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        rank = dist.get_rank()
        if args.batch % dist.get_world_size():
            parser.error(f"--batch = {args.batch}: must be a multiple of {dist.get_world_size()}")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

    torch.manual_seed(0)
    text = read_text()
    model = LanguageModel(CONFIG, device=args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.1)
    done = load(args.checkpoint, model, optimizer)
    run = torch.compile(Loss(model)) if args.compile else Loss(model)
    run = DistributedDataParallel(run) if dist.is_initialized() else run
    parameters = sum(p.numel() for p in model.parameters())
    if rank == 0:
        print(f"{len(text):,} bytes, {parameters:,} parameters, {args.device}, from step {done}")

    start = time.perf_counter()
    for step in range(done + 1, args.steps + 1):
        optimizer.param_groups[0]["lr"] = args.rate * min(1, step / 20)
        window = draw_windows(text, step, args.batch, args.window).to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bfloat16):
            loss = run(window)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if rank == 0 and (step % 10 == 0 or step == args.steps):
            seconds = time.perf_counter() - start
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits per byte, {seconds:.0f} s")
        if rank == 0 and (step % args.save_every == 0 or step == args.steps):
            save(args.checkpoint, step, model, optimizer)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
