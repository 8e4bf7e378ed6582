"""The training step, the optimiser, the configuration and the evaluation."""

import dataclasses
import functools
import json
import lzma
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.documentation import PAGES, ROOT, commands
from helpers.dropout_model import Dropping
from helpers.tiny_run import TINY, write_config
from mc_core import DLAConfig
from mc_core.errors import NotFiniteError, UserError
from mc_core.optimizer import OptimizerConfig
from train.checkpoint import Meta, check_same_run
from train.config import TrainConfig, from_dict, load_config, to_dict
from train.data.corpus import load_corpus
from train.evaluation.validation import make_validation, references
from train.faults import check_finite, tensor_names
from train.optimizer import decay_mask, make_optimizer, make_schedule
from train.shipped_configs import find_config
from train.step import TrainState, build, make_train_step, token_losses


def tiny(**run: object) -> TrainConfig:
    return from_dict(TINY | {"data": TINY["data"] | {"corpus": "x"}, "run": TINY["run"] | run})


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.int32)


def copy(state: TrainState) -> TrainState:
    """Copy a state, because the step donates it."""
    return jax.tree.map(jnp.copy, state)


@functools.cache
def built() -> tuple[Any, TrainState, Any]:
    """Build the tiny run once; tests copy the state before they pass it to the step."""
    return build(tiny())


def test_model_overfits_a_tiny_batch():
    config = tiny(steps=150, batch_size=2)
    config = dataclasses.replace(
        config, optimizer=OptimizerConfig(learning_rate=0.03, warmup_steps=5, weight_decay=0.0)
    )
    _, state, step = build(config)
    tokens = random_tokens(1, 2, 17)
    losses = []
    for _ in range(config.run.steps):
        state, metrics = step(state, tokens)
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(math.log(256), abs=0.5)
    assert losses[-1] < 0.1


def test_accumulation_equals_large_batch():
    """Gradients and parameters equal those of one large batch."""
    _, state, step = built()
    tokens = random_tokens(1, 8, 17)
    large, metrics = step(copy(state), tokens)
    small, accumulated = step(copy(state), tokens.reshape(4, 2, 17))
    assert float(accumulated.loss) == pytest.approx(float(metrics.loss), rel=1e-6)
    assert float(accumulated.grad_norm) == pytest.approx(float(metrics.grad_norm), rel=1e-5)
    # Compare the first moment, 0.1 times the clipped gradient, which Adam does not rescale.
    for a, b in zip(jax.tree.leaves(large), jax.tree.leaves(small), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def test_step_donates_its_state():
    _, state, step = built()
    state = copy(state)
    step(state, random_tokens(1, 2, 17))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_step_is_adamw_on_mean_loss():
    config = tiny()
    graphdef, state, step = built()
    tokens = random_tokens(1, 2, 17)

    def loss(params):
        return token_losses(graphdef, params, state.rest, tokens[0])[0].mean()

    optimizer = make_optimizer(config.optimizer, config.run.steps)

    @jax.jit
    def one_step(params, state):
        updates, _ = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates)

    expected = one_step(state.params, state.optimizer)
    after, _ = step(copy(state), tokens)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_only_matrices_of_projections_and_embeddings_decay():
    config = tiny()
    memory = {"kind": "titans", "expansion": 1}
    layer = TINY["model"]["layer"] | {"memory": memory, "conv_width": 2}
    layer |= {"gate_bias": 1.0, "softmax_temperature": "learned"}
    model = {"layer": layer, "num_layers": 2, "mixers": ["memory", "log_linear"]}
    config = from_dict(to_dict(config) | {"model": TINY["model"] | model})
    _, state, _ = build(config)
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(state.params))
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): on for path, on in mask}
    assert {name.rpartition("/")[2] for name, on in names.items() if on} == {"kernel", "embedding"}
    assert not any(on for name, on in names.items() if "initial" in name or "norm" in name)
    for name in ("initial", "gate_bias", "gate_temperature", "level_scale"):
        assert any(name in path for path in names)

    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), 10)
    zero = jax.tree.map(jnp.zeros_like, state.params)
    updates = jax.jit(lambda p, zero: optimizer.update(zero, optimizer.init(p), p)[0])(
        state.params, zero
    )
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert bool(jnp.any(update != 0)) == names[name], name


def test_schedule_warms_up_and_ends_at_the_final_fraction():
    rate = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10), 100)
    assert 0 < float(rate(0)) < float(rate(5)) < float(rate(10)) == 1.0
    assert float(rate(100)) == pytest.approx(0.1)


def test_clipping_bounds_the_gradient_norm():
    gradient = {"kernel": jnp.full((2, 2), 50.0)}
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0, warmup_steps=0), 10)
    _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
    assert float(optax.tree.norm(state[1][0].mu)) == pytest.approx(0.1, rel=1e-5)


def named(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@pytest.mark.parametrize("kind", ["gradient", "parameter", "loss"])
def test_steps_after_a_nan_change_nothing_and_the_first_tensor_is_named(kind, monkeypatch):
    """The third of five steps meets the value; the host looks only after the fifth."""
    name = "blocks/0/ffn/up_proj/kernel"

    def loss_of(graphdef, params, rest, batch):
        total = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)) * 1e-3
        bad = batch.max() > 255
        if kind == "loss":
            return jnp.where(bad, jnp.nan, 0.0) + total, rest
        matrix = params["blocks"][0]["ffn"]["up_proj"]["kernel"]
        slope = jnp.nan if kind == "gradient" else 0.0
        return total + jnp.where(bad, slope, 0.0) * matrix[0, 0], rest

    monkeypatch.setattr("train.step.sum_losses", loss_of)
    config = tiny()
    optimizer = make_optimizer(config.optimizer, 12)
    if kind == "parameter":
        optimizer = optax.chain(optimizer, overflow_after(2, name))
    graphdef, start, _ = built()
    step = make_train_step(graphdef, optimizer)
    state = copy(start)._replace(optimizer=jax.jit(optimizer.init)(start.params))
    for number in range(1, 6):
        tokens = random_tokens(1, 2, 17) + 1000 * (number == 3)
        state, metrics = step(state, tokens)
        if number == 2:
            kept = copy(state)
    for field in ("params", "optimizer", "rest"):
        before, after = (jax.tree.leaves(getattr(x, field)) for x in (kept, state))
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)
    names = tensor_names(state.params)
    expected = "the loss" if kind == "loss" else f"{kind} of {name}"
    with pytest.raises(
        NotFiniteError, match=rf"^step 13: {expected} is not finite .*checkpoint is step 8$"
    ):
        check_finite(jax.device_get(metrics.faults), names, 10, 8)
    check_finite(jax.device_get(kept.faults), names, 10, 8)


def overflow_after(steps: int, name: str) -> optax.GradientTransformation:
    """Make the update of a parameter infinite in the step after `steps`."""

    def update(updates, count, params=None):
        size = jnp.where(count == steps, jnp.inf, 0.0)
        updates = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf + size if named(path) == name else leaf, updates
        )
        return updates, count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def test_random_streams_advance_between_steps(monkeypatch):
    monkeypatch.setattr("train.step.LanguageModel", Dropping)
    _, state, step = build(tiny())
    tokens = random_tokens(3, 2, 17)
    before = int(state.rest["dropout"]["rngs"]["count"])
    state, _ = step(state, tokens)
    assert int(state.rest["dropout"]["rngs"]["count"]) == before + 3


@pytest.mark.parametrize(
    "limit", [400, *(pytest.param(n, marks=pytest.mark.slow) for n in (399, 33)), 2]
)
def test_bits_per_byte_score_every_byte_once(tmp_path, limit):
    """Reference: windows scored one by one, without padding or batching."""
    config = load_config(write_config(tmp_path))
    corpus = load_corpus(config.data, 256)
    graphdef, state, _ = build(config)
    found = make_validation(graphdef, config, corpus)(state.params, state.rest, limit)
    tokens = np.frombuffer(corpus.validation[:limit], np.uint8).astype(np.int32)
    losses_of = jax.jit(lambda window: token_losses(graphdef, state.params, state.rest, window)[0])
    bits, counted = 8.0, 1
    for start in range(0, limit - 1, 16):
        window = tokens[start : start + 17]
        losses = losses_of(window[None])
        bits += float(losses.sum()) / math.log(2)
        counted += losses.size
    assert counted == limit
    assert found.bits_per_byte == pytest.approx(bits / limit, rel=1e-5)
    assert (found.bits.sum(), found.tokens.sum()) == pytest.approx((bits - 8.0, limit - 1))


def test_reference_bits_per_byte():
    flat = references(bytes(range(256)) * 8)
    assert flat.uniform == flat.order0 == 8.0
    text = b"ab" * 500
    assert references(text).order0 == 1.0
    assert references(text).xz == 8 * len(lzma.compress(text, preset=9)) / 1000


def test_config_round_trip_and_base(tmp_path):
    path = write_config(tmp_path)
    config = load_config(path, ["run.seed=3", "optimizer.clip_norm=null"])
    assert config.run.seed == 3
    assert config.optimizer.clip_norm is None
    assert from_dict(to_dict(config)) == config
    twin = tmp_path / "twin.yaml"
    twin.write_text("base: tiny.yaml\nmodel: {layer: {aggregation: none}}\n")
    loaded = load_config(twin)
    assert loaded.model.layer.aggregation == "none"
    assert loaded.data == config.data
    twin.write_text("base: tiny.yaml\n")
    assert load_config(twin, ["model.layer.memory.kind=dla"]).model.layer.memory.kind == "dla"
    words = ["model.layer.memory.step=0.25", "model.layer.memory.kind=dla"]
    assert load_config(twin, words).model.layer.memory == DLAConfig(step=0.25)


def test_config_of_mixers(tmp_path):
    path = write_config(tmp_path)
    twin = tmp_path / "twin.yaml"
    twin.write_text("base: tiny.yaml\nmodel: {mixers: [attention]}\n")
    config = load_config(twin)
    assert config.model.mixers == ("attention",)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    for word in ("model.mixers=window", "model.mixers=[window]"):
        assert load_config(twin, [word, "model.ffn_width=0"]).model.mixers == ("window",)
    message = (
        r"model.mixers = \['lstm'\]: must be a list of 1 to num_layers = 1 names out of 'memory'"
    )
    with pytest.raises(UserError, match=message):
        load_config(path, ["model.mixers=lstm"])
    # A checkpoint of a version without `mixers` resumes with the former model.
    now = Meta(to_dict(load_config(path)), "text", 0.0)
    old = json.loads(json.dumps(now.config))
    for key in ("mixers", "attention_window", "rope_base", "num_levels"):
        del old["model"][key]
    check_same_run(tmp_path, now._replace(config=old), now)
    with pytest.raises(UserError, match=r"another version .*unknown key 'depth'"):
        check_same_run(tmp_path, now._replace(config=old | {"depth": 1}), now)
    other = now._replace(config=to_dict(config))
    with pytest.raises(UserError, match=r"model.mixers was \['memory'\] and is \['attention'\]"):
        check_same_run(tmp_path, now._replace(config=old), other)


def test_default_directory_is_named_after_the_file(tmp_path):
    (tmp_path / "other.yaml").write_text(
        "data: {corpus: x}\nrun: {steps: 200}\n"
        "model: {vocab_size: 256, num_layers: 1, layer: {d_model: 8, num_heads: 1}}\n"
    )
    (tmp_path / "twin.yaml").write_text("base: other.yaml\n")
    assert load_config(tmp_path / "twin.yaml").run.directory == "runs/twin"


def test_documented_commands_have_valid_configs(monkeypatch):
    """All keys exist, and runs with different settings have different directories."""
    monkeypatch.chdir(ROOT)
    found = [words[1:] for page in PAGES for words in commands(page) if words[:1] == ["train"]]
    found = [words for words in found if words[:1] not in ([], ["CONFIG"])]
    configs = [load_config(find_config(Path(path)), words) for path, *words in found]
    assert len(set(configs)) == len({config.run.directory for config in configs}) >= 5


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run.steps=abc", "run.steps = 'abc': must be of type int"),
        ("run.steps=3.5", "run.steps = 3.5: must be of type int"),
        ("run.steps=true", "run.steps = True: must be of type int"),
        ("run.steps=0", "run.steps = 0: must be >= 1"),
        ("run.seed=4294967296", "run.seed = 4294967296: must be in [0, 4294967295]"),
        ("run.devices=2", "run: unknown key 'devices'; allowed are steps, "),
        ("run.mesh.data=0", "run.mesh.data = 0: must be >= 1, or -1 for what is left"),
        ("run.mesh.fsdp=-1", "run.mesh.fsdp = -1: must be >= 1, if another axis is -1"),
        ("run.mesh.data=3", "run.mesh.data = 3: must be a divisor of run.batch_size = 2"),
        ("run.mesh.heads=4", "run.mesh.heads = 4: must be a divisor of model.layer.num_heads = 2"),
        ("run.mesh.heads=null", "run.mesh.heads = None: must be of type int"),
        ("run.mesh.rows=2", "run.mesh: unknown key 'rows'; allowed are data, fsdp, heads, context"),
        ("run.stesp=1", "run: unknown key 'stesp'; allowed are steps, "),
        ("runs.steps=1", "unknown key 'runs'; allowed are data, model, run, optimizer"),
        ("run=3", "run = 3: must be a mapping"),
        ("run.dtype=half", "run.dtype = 'half': must be one of 'float32', 'bfloat16'"),
        ("run.dtype=float16", "float16 overflows above 65,504 and underflows below 6e-8"),
        ("run.param_dtype=float16", "run.param_dtype = 'float16': must be 'float32' or 'bfloat16'"),
        ("run.profile=[3,2]", "run.profile = [3, 2]: must be the first and the last step"),
        ("run.profile=[3,13]", "run.profile = [3, 13]: must be within run.steps = 12"),
        ("run.peak_flops=0", "run.peak_flops = 0.0: must be > 0.0"),
        ("optimizer.name=sgd", "optimizer.name = 'sgd': must be one of 'adamw', 'lion', 'muon'"),
        ("optimizer.schedule=step", "'step': must be one of 'cosine', 'wsd', 'constant'"),
        ("optimizer.decay_fraction=0", "optimizer.decay_fraction = 0.0: must be in (0.0, 1.0]"),
        ("optimizer.moment_dtype=float16", "'float16': must be one of 'float32', 'bfloat16'"),
        ("optimizer.ema_decay=1.0", "optimizer.ema_decay = 1.0: must be in (0.0, 1.0)"),
        ("optimizer.learning_rate=x", "optimizer.learning_rate = 'x': must be of type float"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate = inf: must be finite"),
        ("optimizer.beta1=1.0", "optimizer.beta1 = 1.0: must be in [0.0, 1.0)"),
        ("optimizer.warmup_steps=12", "optimizer.warmup_steps = 12: must be < run.steps = 12"),
        ("data.corpus=3", "data.corpus = 3: must be text or a list of text"),
        ("data.corpus=[]", "data.corpus = []: must be at least one file or folder"),
        ("model.vocab_size=255", "model.vocab_size = 255: must be >= 256 for bytes"),
        ("model.layer.size=1", "model.layer: unknown key 'size'; allowed are d_model, "),
        (
            "model.layer.memory.kind=lstm",
            "model.layer.memory.kind = 'lstm': must be one of 'linear'",
        ),
        ("model.layer.memory.step=0.0", "model.layer.memory.step = 0.0: must be > 0.0"),
        (
            "model.layer.softmax_temperature=hot",
            "model.layer.softmax_temperature = 'hot': must be > 0.0 or 'learned'",
        ),
        ("steps", "steps: must have the form key=value"),
        ("data.corpus=[1", "while parsing a flow sequence"),
        ("run.seed=${nothing}", "Interpolation key 'nothing' not found"),
    ],
)
def test_configuration_errors_name_the_key(tmp_path, word, message):
    path = write_config(tmp_path)
    with pytest.raises(UserError) as error:
        load_config(path, [word])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("word", "value"), [("learned", "learned"), ("0.25", 0.25), ("2", 2.0)])
def test_temperature_is_a_number_or_a_word(tmp_path, word, value):
    path = write_config(tmp_path)
    loaded = load_config(path, [f"model.layer.softmax_temperature={word}"])
    assert loaded.model.layer.softmax_temperature == value


def test_unreadable_config_files_are_named(tmp_path):
    for name, text, message in (
        ("missing.yaml", None, "No such file"),
        ("list.yaml", "- 1\n", "must be a mapping"),
        ("broken.yaml", "a: [1\n", "not a YAML file"),
        ("circle.yaml", "base: circle.yaml\n", "cyclic reference"),
        ("lost.yaml", "base: nowhere.yaml\n", "nowhere.yaml: No such file"),
        ("number.yaml", "base: 3\n", "must be the name of a YAML file"),
        ("short.yaml", "data: {corpus: x}\n", "key 'model' is missing"),
    ):
        if text:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            load_config(tmp_path / name)


def test_train_step_accepts_any_optimizer():
    graphdef, state, _ = built()
    step = make_train_step(graphdef, optax.sgd(0.0))
    start = copy(state)._replace(optimizer=optax.sgd(0.0).init(state.params))
    after, _ = step(start, random_tokens(1, 2, 17))
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True):
        assert jnp.array_equal(a, b)
