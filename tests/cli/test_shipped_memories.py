"""Memories of the shipped configurations, before training, on 2,048 bytes of text."""

import argparse
import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from mc_core.config import ModelConfig
from mc_jax import LanguageModel
from train.config import TrainConfig, load_config
from train.evaluation.heads import HeadReport, measure_heads
from train.shipped_configs import describe, find_config, shipped_names
from train.sweeps.sweep_config import load_sweep, make_runs


def train_configs(name: str) -> list[TrainConfig]:
    """Return the configurations of all rows of a shipped file."""
    path = find_config(Path(name))
    if "train" in describe(name).command:
        return [load_config(path)]
    return [runs[0].config for runs in make_runs(load_sweep(path)).values()]


def small_models(*names: str) -> list[ModelConfig]:
    """Return a model of 2 blocks for each MLP memory, with at most 4 heads of the same width."""
    models: dict[tuple, ModelConfig] = {}
    for config in itertools.chain.from_iterable(map(train_configs, names)):
        model, layer = config.model, config.model.layer
        is_matrix = len(layer.memory.widths(4, 4)) == 2
        if "memory" not in model.mixers or is_matrix:
            continue
        heads = min(4, layer.num_heads)
        width = layer.d_model // layer.num_heads * heads
        layer = dataclasses.replace(layer, d_model=width, num_heads=heads)
        vocab = min(model.vocab_size, 512)
        model = dataclasses.replace(model, num_layers=2, vocab_size=vocab, layer=layer)
        key = (layer.memory, layer.chunk_size, layer.state_init_mode, layer.value_norm, width)
        models.setdefault(key, model)
    return list(models.values())


def heads_on_text(config: ModelConfig) -> HeadReport:
    """Return recall and dead heads on the first 2,048 bytes of a standard module."""
    text = np.frombuffer(Path(argparse.__file__).read_bytes()[:2048], np.uint8)
    report = measure_heads(LanguageModel(config, rngs=nnx.Rngs(0)), text.astype(np.int32)[None])
    assert report is not None
    jax.clear_caches()
    return report


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["", "mqar", "niah", "text"])
def test_no_head_is_dead(folder):
    models = small_models(*(name for name in shipped_names() if name.rpartition("/")[0] == folder))
    assert models
    for config in models:
        report = heads_on_text(config)
        assert len(report.blocks) == 2
        assert not np.any(report.dead), config.layer.memory


@pytest.mark.slow
def test_dead_heads_are_found():
    (config,) = small_models("text/base")
    memory = dataclasses.replace(config.layer.memory, step=1e-7, coefficients="constant")
    layer = dataclasses.replace(config.layer, memory=memory)
    assert np.all(heads_on_text(dataclasses.replace(config, layer=layer)).dead)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["760m", "1300m", "demo", "demo_none", "text/base"])
def test_writes_lower_the_inner_loss(name):
    (config,) = small_models(name)
    assert np.min(heads_on_text(config).recall) > 0
