"""Comparison of sharded with unsharded models in two gloo processes.

    python fsdp_worker.py FILE

FILE is the rendezvous of the processes and must not exist. Each check is printed when it starts.
"""

import os
import sys
from datetime import timedelta
from functools import cache

import torch
import torch._dynamo
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from mc_core import LinearConfig, MCConfig, ModelConfig, TitansConfig
from mc_torch import LanguageModel, MemoryCachingLayer, generate

LAYER = MCConfig(8, 2, TitansConfig(expansion=1), segment_size=4, chunk_size=2, conv_width=2)
TOKENS = torch.arange(14).reshape(2, 7) * 5 % 11
PROMPTS = ([1, 2, 3], [4])


def make_model(**options):
    """Build a model with fixed weights."""
    torch.manual_seed(0)
    options = {"num_layers": 2, "mixers": ("memory", "attention"), "ffn_width": 8} | options
    return LanguageModel(ModelConfig(vocab_size=11, layer=LAYER, **options))


def reshard(module):
    """Reshard a module, because FSDP keeps the root's parameters unsharded after a call."""
    if isinstance(module, FSDPModule):
        module.reshard()
    return module


def stream(module, x):
    """Return outputs and final cache of a stream of two calls."""
    cache = reshard(module).init_cache(len(x), 3)
    first, cache = reshard(module).extend(x[:, :3], cache)
    second, cache = module.extend(x[:, 3:], module.grow(cache, x.shape[1]))
    return torch.cat([first, second], dim=1), cache


def run_methods(model):
    """Return the results of all methods but `forward`."""
    with torch.no_grad():
        seen = stream(model, TOKENS), reshard(model).inspect(TOKENS)
    options = {"temperature": 1.0, "top_k": 5}
    return *seen, *(list(generate(model, PROMPTS, 2, **chosen)) for chosen in ({}, options))


def leaves(tree):
    """Return the tensors of nested tuples and lists."""
    if isinstance(tree, tuple | list):
        return [leaf for part in tree for leaf in leaves(part)]
    return [] if tree is None else [tree]


def check_equal(actual, expected):
    """Compare trees of plain tensors."""
    actual, expected = leaves(actual), leaves(expected)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert not isinstance(one, DTensor)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def shard_blocks(model, **options):
    """Shard each block separately, and nothing else."""
    for block in model.blocks:
        fully_shard(block, **options)


def shard_blocks_and_rest(model, **options):
    """Shard the blocks, then the root with the remaining parameters, as in training."""
    shard_blocks(model, **options)
    fully_shard(model, **options)


def shard_mixers(model):
    """Shard only memories and attentions."""
    for block in model.blocks:
        fully_shard(block.mixer)


def shard_parts(model, **options):
    """Shard the parts of each block, and embedding, norm and head separately."""
    for block in model.blocks:
        fully_shard(block.mixer, **options)
        fully_shard(block.ffn, **options)
        fully_shard(block, **options)
    fully_shard(model.embed, **options)
    if hasattr(model, "head"):
        fully_shard([model.norm, model.head], **options)
    fully_shard(model, **options)


def shard_wrapped(model):
    """Shard blocks that are checkpointed and compiled, as torchtitan does."""
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(checkpoint_wrapper(block), backend="eager")
    shard_blocks_and_rest(model)


def wrap_sharded(model):
    """Wrap blocks that are already sharded."""
    shard_blocks(model)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    fully_shard(model)


@cache
def expected(tie_embeddings):
    """Return the results of the unsharded model."""
    return run_methods(make_model(tie_embeddings=tie_embeddings))


def check_model(shard, tie_embeddings):
    model = make_model(tie_embeddings=tie_embeddings)
    shard(model)
    check_equal(run_methods(model), expected(tie_embeddings))


def check_layer(memory):
    torch.manual_seed(0)
    config = MCConfig(8, 2, memory, segment_size=2, chunk_size=2, conv_width=2)
    plain, layer = MemoryCachingLayer(config), MemoryCachingLayer(config)
    layer.load_state_dict(plain.state_dict())
    fully_shard(layer)
    x = torch.randn(2, 7, 8)
    with torch.no_grad():
        seen = [
            (stream(one, x), reshard(one).inspect(x), reshard(one).forward_with_cache(x))
            for one in (layer, plain)
        ]
    check_equal(*seen)
    assert not hasattr(layer._call.__wrapped__, "__wrapped__")  # registered with FSDP once


def check_gradients():
    """Check gradients through the calls of a stream, as in truncated backpropagation."""
    model, plain = make_model(), make_model()
    shard_blocks_and_rest(model)
    for one in (model, plain):
        logits, cache = stream(one, TOKENS)
        (logits.sin().sum() + cache[0].state.weights[0].sum()).backward()
    for sharded, whole in zip(model.parameters(), plain.parameters(), strict=True):
        check_equal(sharded.grad.full_tensor(), whole.grad)


def check_mixed_precision():
    """Check that FSDP casts inputs and outputs but not states, which stay float32."""
    model = make_model(tie_embeddings=False)
    policy = MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.bfloat16)
    shard_parts(model, mp_policy=policy)
    with torch.no_grad():
        whole, (logits, cache), (_, traces) = model(TOKENS), *run_methods(model)[:2]
    assert whole.dtype == logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, whole, rtol=0.05, atol=0.05)
    kinds = {x.dtype for x in leaves((cache, traces)) if x.is_floating_point()}
    assert kinds == {torch.float32}, kinds


def check_tensor_parallel():
    """Check tensor parallelism of the projections of a SwiGLU and of the embedding."""
    model = make_model()
    mesh = init_device_mesh("cpu", (2,))
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()}
    for block in model.blocks:
        parallelize_module(block.ffn, mesh, plan | {"down_proj": RowwiseParallel()})
        assert block.ffn.gate_proj.weight.to_local().shape == (4, 8)
    parallelize_module(model, mesh, {"embed": RowwiseParallel(input_layouts=Replicate())})
    assert isinstance(model.embed.weight, DTensor)
    check_equal(run_methods(model), expected(True))


CHECKS = {
    "blocks": lambda: check_model(shard_blocks, True),
    "root": lambda: check_model(fully_shard, True),
    "blocks and root": lambda: check_model(shard_blocks_and_rest, False),
    "mixers": lambda: check_model(shard_mixers, False),
    "parts, tied": lambda: check_model(shard_parts, True),
    "parts, untied": lambda: check_model(shard_parts, False),
    "compiled and checkpointed blocks": lambda: check_model(shard_wrapped, True),
    "checkpointed around sharded blocks": lambda: check_model(wrap_sharded, True),
    "layer, learned memory": lambda: check_layer(TitansConfig(expansion=1)),
    "layer, memory that starts at zero": lambda: check_layer(LinearConfig()),
    "gradients": check_gradients,
    "mixed precision": check_mixed_precision,
    "tensor parallel": check_tensor_parallel,
}


def main(file):
    """Run all checks, each in both processes at the same time."""
    torch.set_num_threads(1)
    child = os.fork()  # before threads start, so that both see the imports
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=0 if child else 1,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    for name, check in CHECKS.items():
        if child:
            print(name, flush=True)
        check()
    dist.destroy_process_group()
    if child:
        _, status = os.waitpid(child, 0)
        assert status == 0
        print("all equal", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
