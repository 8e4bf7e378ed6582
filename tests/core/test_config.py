"""Configurations: error messages, and strict conversion to and from dictionaries."""

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest

from helpers.cases import AGGREGATIONS, GATES, MEMORIES, make_case
from helpers.jax_calls import arrays
from mc_core import (
    AttentionConfig,
    DLAConfig,
    LinearConfig,
    MCConfig,
    ModelConfig,
    SWLAConfig,
    TitansConfig,
    make_plan,
    segment_lengths,
)
from mc_jax import Coefficients, memory_caching

LAYER = {"d_model": 8, "num_heads": 2}
MODEL = {"vocab_size": 11, "num_layers": 1, "layer": MCConfig(**LAYER)}
CONFIGS: dict[type, dict[str, Any]] = {
    LinearConfig: {},
    SWLAConfig: {},
    DLAConfig: {},
    TitansConfig: {},
    MCConfig: LAYER,
    AttentionConfig: LAYER,
    ModelConfig: MODEL,
}
CHOICES = {
    "feature_map": ("identity", "elu+1"),
    "coefficients": ("constant", "head", "token"),
    "norm": ("none", "layer"),
    "objective": ("dot", "l2"),
    "aggregation": AGGREGATIONS,
    "segmentation": ("constant", "logarithmic"),
    "state_init_mode": ("checkpoint", "restart"),
    "pooling": ("mean", "sum"),
    "qk_norm": ("l2", "none"),
    "output_norm": ("rms", "none"),
    "gate": GATES,
    "pool_norm": ("none", "l2"),
}
FIELDS = [(cls, field.name) for cls in CONFIGS for field in dataclasses.fields(cls)]
MLP, LEARNED = (DLAConfig, TitansConfig), {"coefficients": "token"}
FLOOR = LEARNED | {"min_retention": 0.7}
# (configurations, field, values, allowed, other fields)
RANGES: list[tuple[tuple[type, ...], str, tuple[Any, ...], str, dict[str, Any]]] = [
    (MLP, "depth", (0, -1), ">= 1", {}),
    (MLP, "expansion", (0,), ">= 1", {}),
    (MLP, "inner_clip", (0.0, -1.0), "> 0.0", {}),
    ((LinearConfig, SWLAConfig, *MLP), "retention", (0.0, 1.01), "in (0.0, 1.0]", {}),
    ((TitansConfig,), "momentum", (-0.1, 1.0), "in [0.0, 1.0)", {}),
    (MLP, "step", (0.0, 1.1), "in (0.0, 1.0]", LEARNED),
    ((LinearConfig,), "step", (0.0, 2.1), "in (0.0, 2.0]", LEARNED),
    ((LinearConfig, *MLP), "step", (0.0, -1.0), "> 0.0", {"coefficients": "constant"}),
    ((LinearConfig, *MLP), "min_retention", (-0.1, 1.0), "in [0.0, 1.0)", LEARNED),
    ((LinearConfig, *MLP), "retention", (0.6, 1.1), "in [0.7, 1.0]", FLOOR),
    (
        MLP,
        "min_retention",
        (0.5,),
        "0.0 if coefficients = 'constant'",
        {"coefficients": "constant"},
    ),
    ((SWLAConfig,), "newest", (-0.1, 2.1), "in [0.0, 2.0]", LEARNED),
    ((SWLAConfig,), "previous", (-1.1, 1.1), "in [-1.0, 1.0]", LEARNED),
    *(((MCConfig,), name, (0, -3), ">= 1", {}) for name in ("d_model", "num_heads")),
    *(((MCConfig,), name, (0,), ">= 1", {}) for name in ("segment_size", "ssc_top_k")),
    ((MCConfig,), "chunk_size", (0,), ">= 1", {}),
    ((MCConfig,), "conv_width", (-1,), ">= 0", {}),
    ((MCConfig,), "softmax_temperature", (0.0, -1.0, "1", ""), "> 0.0 or 'learned'", {}),
    ((MCConfig,), "d_model", (9,), "a multiple of num_heads = 2", {}),
    *(((ModelConfig,), name, (0,), ">= 1", {}) for name in ("vocab_size", "num_layers")),
    ((ModelConfig,), "ffn_width", (-8,), ">= 0", {}),
    ((ModelConfig,), "attention_window", (0,), ">= 1", {}),
    ((ModelConfig, AttentionConfig), "rope_base", (0.5,), ">= 1.0", {}),
    *(((AttentionConfig,), n, (0,), ">= 1", {}) for n in ("d_model", "num_heads", "window")),
    ((AttentionConfig,), "conv_width", (-1,), ">= 0", {}),
    ((AttentionConfig,), "d_model", (6, 9), "a multiple of 2 * num_heads = 4", {}),
]


def assert_rejected(cls: type, field: str, value: Any, allowed: str, **others: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{cls.__name__}.{field} = {value!r}: ")) as e:
        cls(**{**CONFIGS[cls], **others, field: value})
    assert allowed in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_fields_reject_other_types(cls, field):
    assert_rejected(cls, field, [1], "must be of type ")
    hint = str(next(f.type for f in dataclasses.fields(cls) if f.name == field))
    if "bool" not in hint:
        assert_rejected(cls, field, True, "must be of type ")
    if "float" in hint:
        for value in (float("nan"), float("inf")):
            assert_rejected(cls, field, value, "must be finite")
    if hint in ("int", "int | None"):
        assert_rejected(cls, field, 1.0, "must be of type int")


@pytest.mark.parametrize(
    ("cls", "field"),
    [x for x in FIELDS if x[1] in CHOICES],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_unknown_names_are_rejected(cls, field):
    allowed = "must be one of " + ", ".join(map(repr, CHOICES[field]))
    assert_rejected(cls, field, "unheard-of", allowed)
    for name in CHOICES[field]:
        cls(**{**CONFIGS[cls], field: name})


@pytest.mark.parametrize(("classes", "field", "values", "allowed", "others"), RANGES)
def test_numbers_out_of_range_are_rejected(classes, field, values, allowed, others):
    for cls in classes:
        for value in values:
            assert_rejected(cls, field, value, f"must be {allowed}", **others)


def test_closed_range_ends_are_accepted():
    for cls in (LinearConfig, DLAConfig, TitansConfig):
        cls(step=cls.ranges["step"][1], retention=1.0, coefficients="token")
        cls(step=50, coefficients="constant")  # an int for a float; no upper bound
    TitansConfig(momentum=0.0, inner_clip=None, depth=1, expansion=1)
    SWLAConfig(newest=0.0, previous=-1.0, retention=1e-9)
    SWLAConfig(newest=-7.0, previous=9.0, coefficients="constant")
    MCConfig(1, 1, segment_size=1, ssc_top_k=1, chunk_size=1, conv_width=0)


def test_configurations_are_frozen_with_derived_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MCConfig(**LAYER).d_model = 9  # type: ignore[misc]
    assert MCConfig(**LAYER).head_dim == 4
    gated = {a: MCConfig(**LAYER, aggregation=a).gated for a in AGGREGATIONS}
    assert [a for a, is_gated in gated.items() if is_gated] == ["grm", "soup", "ssc"]
    for name, memory in MEMORIES.items():
        unit_keys = name.startswith(("delta", "dla", "titans"))
        assert MCConfig(**LAYER, memory=memory).normalizes_qk == unit_keys
        assert MCConfig(**LAYER, memory=memory, qk_norm="l2").normalizes_qk
        assert not MCConfig(**LAYER, memory=memory, qk_norm="none").normalizes_qk
    assert ModelConfig(**{**MODEL, "layer": MCConfig(48, 2)}).ffn_dim == 128
    assert ModelConfig(**MODEL, ffn_width=5).ffn_dim == 5
    assert ModelConfig(**MODEL).ffn_dim == 24  # 8/3 of 8 is 21.3
    assert ModelConfig(**MODEL, ffn_width=0).ffn_dim == 0


def test_mixer_pattern_repeats_over_blocks():
    layer = MCConfig(8, 2, conv_width=4, output_norm="none")
    options = {"attention_window": 5, "rope_base": 7.0}
    full, few = (AttentionConfig(8, 2, window, 7.0, 4, "none") for window in (None, 5))

    def layers(*mixers: str) -> tuple[Any, ...]:
        return ModelConfig(11, 3, layer, mixers=mixers, **options).block_layers

    assert layers("memory") == (layer,) * 3
    assert layers("attention") == (full,) * 3
    assert layers("window", "memory") == (few, layer, few)
    assert layers("memory", "attention", "window") == (layer, full, few)
    for mixers in ([], ["lstm"], ["memory"] * 4):
        allowed = "must be a list of 1 to num_layers = 3 names out of 'memory', "
        message = f"ModelConfig.mixers = {mixers}: {allowed}"
        with pytest.raises(ValueError, match=re.escape(message)):
            layers(*mixers)
    with pytest.raises(ValueError, match=r"ModelConfig.layer.d_model = 6: must be a multiple of 2"):
        ModelConfig(11, 1, MCConfig(6, 2), mixers=("attention",))


def test_configuration_without_mixers_uses_memories():
    old = {
        "vocab_size": 11, "num_layers": 2, "layer": LAYER, "ffn_width": None,
        "tie_embeddings": True, "remat": "none",
    }  # fmt: skip
    config = ModelConfig.from_dict(old)
    assert config.block_layers == (MCConfig(**LAYER),) * 2
    assert config.to_dict()["mixers"] == ["memory"]
    assert ModelConfig.from_dict({**old, "mixers": "attention"}).mixers == ("attention",)


def test_remat_of_older_configurations_is_a_boolean():
    config = ModelConfig(9, 2, MCConfig(8, 2))
    for old, new in ((False, "none"), (True, "full")):
        data = config.to_dict() | {"remat": old}
        assert ModelConfig.from_dict(data).remat == new
        assert ModelConfig.from_dict(data).to_dict()["remat"] == new
    with pytest.raises(ValueError, match="remat = 'some': must be one of 'none', 'full', 'dots'"):
        ModelConfig.from_dict(config.to_dict() | {"remat": "some"})


@pytest.mark.parametrize("name", MEMORIES)
def test_configuration_dictionaries_round_trip(name):
    layer = MCConfig(8, 2, MEMORIES[name], "ssc", segment_size=5, qk_norm="none", conv_width=4)
    model = ModelConfig(11, 3, layer, tie_embeddings=False, mixers=("window", "memory"))
    for config in (MEMORIES[name], layer, AttentionConfig(8, 2, 3), model):
        plain = json.loads(json.dumps(config.to_dict()))
        assert type(config).from_dict(plain) == config
    assert set(layer.to_dict()) == {f.name for f in dataclasses.fields(MCConfig)}
    assert layer.to_dict()["memory"]["kind"] == layer.memory.kind
    assert MCConfig.from_dict({"d_model": 8, "num_heads": 2}) == MCConfig(8, 2)
    newer = ("gate", "gate_bias", "pool_norm")
    older = {key: value for key, value in layer.to_dict().items() if key not in newer}
    assert MCConfig.from_dict(older) == layer


def test_learned_temperature_is_a_word():
    config = MCConfig(**LAYER, softmax_temperature="learned", gate_bias=1)
    assert (config.score_divisor, config.learns_temperature, config.has_gate_bias) == (
        1,
        True,
        True,
    )
    assert MCConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert type(MCConfig.from_dict({**LAYER, "softmax_temperature": 2}).score_divisor) is float
    plain = MCConfig(**LAYER, softmax_temperature=0.5)
    assert (plain.score_divisor, plain.learns_temperature, plain.has_gate_bias) == (
        0.5,
        False,
        False,
    )
    ungated = MCConfig(**LAYER, aggregation="mean", softmax_temperature="learned", gate_bias=0.0)
    assert not ungated.learns_temperature
    assert not ungated.has_gate_bias
    for value, allowed in (("hot", "> 0.0 or 'learned'"), (True, "of type float or str")):
        message = f"MCConfig.softmax_temperature = {value!r}: must be {allowed}"
        with pytest.raises(ValueError, match=re.escape(message)):
            MCConfig.from_dict({**LAYER, "softmax_temperature": value})


def test_configuration_dictionaries_are_strict():
    memory = {"kind": "titans"}
    invalid: list[tuple[type, Any, str]] = [
        (MCConfig, {**LAYER, "segments": 3}, "MCConfig: unknown key 'segments'; allowed are d_mo"),
        (MCConfig, {"d_model": 8}, "MCConfig: key 'num_heads' is missing"),
        (MCConfig, [1], "MCConfig = [1]: must be a mapping"),
        (MCConfig, {**LAYER, "memory": {"kind": "lstm"}}, "MCConfig.memory.kind = 'lstm': must be"),
        (MCConfig, {**LAYER, "memory": {}}, "MCConfig.memory.kind = None: must be one of 'linear'"),
        (
            MCConfig,
            {**LAYER, "memory": {**memory, "rate": 1}},
            "MCConfig.memory: unknown key 'rate'",
        ),
        (MCConfig, {**LAYER, "memory": {**memory, "depth": 0}}, "MCConfig.memory.depth = 0: must"),
        (MCConfig, {**LAYER, "memory": "titans"}, "MCConfig.memory = 'titans': must be a mapping"),
        (MCConfig, {**LAYER, "kind": "linear"}, "MCConfig: unknown key 'kind'"),
        (DLAConfig, memory, "DLAConfig.kind = 'titans': must be 'dla'"),
        (LinearConfig, {"depth": 2}, "LinearConfig: unknown key 'depth'"),
        (ModelConfig, {**MODEL, "layer": {"d_model": 8}}, "ModelConfig.layer: key 'num_heads' is"),
        (ModelConfig, {"layer": LAYER}, "ModelConfig: key 'vocab_size' is missing"),
    ]
    for cls, data, message in invalid:
        with pytest.raises(ValueError, match=re.escape(message)):
            cls.from_dict(data)


def test_plans_reject_lengths_that_do_not_sum_to_tokens():
    config = MCConfig(**LAYER)
    for lengths in ([], [3, 4], [8, 0], [9, -1], [5, 4]):
        message = f"segment_lengths = {lengths}: must be positive and add up to 8 tokens"
        with pytest.raises(ValueError, match=re.escape(message)):
            make_plan(8, config, lengths)
    with pytest.raises(ValueError, match="tokens = 0: must be >= 1"):
        make_plan(0, config)
    with pytest.raises(ValueError, match="segment_size = 0: must be >= 1"):
        segment_lengths(8, "constant", 0)
    with pytest.raises(ValueError, match="segmentation = 'fibonacci': must be one of 'constant'"):
        segment_lengths(8, "fibonacci")


def _coefficient(name: str, value: Any) -> Any:
    return lambda x: {"coefficients": x["coefficients"]._replace(**{name: value})}


T = (2, 13, 2)
# (memory, aggregation, change of the inputs, message)
ARGUMENTS: list[tuple[str, str, Any, str]] = [
    ("linear", "grm", lambda x: {"method": "fast"}, "method = 'fast': must be one of 'chunked'"),
    ("linear", "grm", lambda x: {"q": x["q"][0]}, "q has shape (13, 2, 4), v (2, 13, 2, 3): must"),
    ("linear", "grm", lambda x: {"v": x["v"][..., 0]}, "v (2, 13, 2): must be [b, t, h, k] and"),
    ("linear", "grm", lambda x: {"k": x["k"][:, 1:]}, "k has shape (2, 12, 2, 4): must be (2, 13,"),
    ("linear", "grm", lambda x: {"v": x["v"][:, :, :1]}, "v has shape (2, 13, 1, 3): must be (2, "),
    ("linear", "grm", lambda x: {"u": x["u"][..., :3]}, "u has shape (2, 13, 2, 3): must be (2, "),
    (
        "linear",
        "grm",
        lambda x: {"gate_bias": np.ones(3)},
        "gate_bias has shape (3,): must be (2,)",
    ),
    *(
        ("linear", a, lambda x: {"u": None}, f"u = None: must be given for aggregation = '{a}'")
        for a in ("grm", "soup", "ssc")
    ),
    (
        "linear",
        "grm",
        lambda x: {"mask": np.ones((2, 12), bool)},
        "mask has shape (2, 12) and dtype bool: must be (2, 13)",
    ),
    ("linear", "grm", lambda x: {"segment_lengths": [6, 6]}, "segment_lengths = [6, 6]: must be"),
    (
        "linear",
        "grm",
        _coefficient("momentum", np.ones(T)),
        "coefficients.momentum is given: 'line",
    ),
    ("linear", "grm", _coefficient("previous", np.ones(T)), "coefficients.previous is given"),
    ("linear", "grm", _coefficient("step", None), "coefficients.step is missing: 'linear' takes"),
    ("swla", "grm", _coefficient("previous", None), "coefficients.previous is missing: 'swla' tak"),
    ("titans", "grm", _coefficient("momentum", None), "coefficients.momentum is missing: 'titans'"),
    ("dla", "grm", _coefficient("retention", np.ones((2, 13))), "coefficients.retention has shape"),
    ("dla", "none", lambda x: {"initial": x["initial"][:1]}, "initial has 1 weights: must be 2"),
    (
        "dla",
        "none",
        lambda x: {"initial": x["initial"][::-1]},
        "initial[0] has shape (2, 4, 8): mu",
    ),
    ("linear", "none", lambda x: {"initial": (x["initial"][0][:1],)}, "initial[0] has shape (1, 3"),
    (
        "dla",
        "none",
        lambda x: {"v": x["v"][..., :3]},
        "v has width 3: must be 4, the width of k",
    ),
    (
        "dla",
        "none",
        lambda x: {"norm": (1, 2)},
        "norm is given: must be None for memory = DLAConfig(",
    ),
    (
        "titans-norm",
        "none",
        lambda x: {"norm": None},
        "norm is None: must be (gain, bias) for memory = TitansConfig(",
    ),
    (
        "titans-norm",
        "none",
        lambda x: {"v": x["v"][..., :3]},
        "v has width 3: must be 4, the width of k",
    ),
]


@pytest.mark.parametrize(("memory", "aggregation", "change", "message"), ARGUMENTS)
def test_memory_caching_names_the_invalid_argument(memory, aggregation, change, message):
    case = make_case(memory, aggregation)
    inputs = arrays(case, np.float32)
    inputs |= change(inputs)
    with pytest.raises(ValueError, match=re.escape(message)):
        memory_caching(**inputs, config=case.config)


def test_norms_and_matrix_memories():
    """Only `norm="layer"` takes a gain and a bias, each [h, v]."""
    case = make_case("linear", "none")
    inputs = arrays(case, np.float32)
    with pytest.raises(ValueError, match="norm is given"):
        memory_caching(**{**inputs, "norm": (np.ones((2, 3)),) * 2}, config=case.config)
    case = make_case("titans-norm", "none")
    inputs = arrays(case, np.float32)
    with pytest.raises(ValueError, match=re.escape("norm[0] has shape (2, 5): must be (2, 4)")):
        memory_caching(**{**inputs, "norm": (np.ones((2, 5)),) * 2}, config=case.config)


def test_configured_gate_bias_must_be_given():
    """Only aggregations with gates use it."""
    case = make_case("linear", "grm", gate_bias=0.5)
    inputs = {**arrays(case, np.float32), "gate_bias": None}
    message = "gate_bias = None: must be given for config.gate_bias = 0.5"
    with pytest.raises(ValueError, match=re.escape(message)):
        memory_caching(**inputs, config=case.config)
    assert make_case("linear", "residual", gate_bias=0.5).gate_bias is None


def test_coefficient_order_is_consistent():
    assert Coefficients._fields == type(make_case().coefficients)._fields
