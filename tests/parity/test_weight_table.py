"""The weight table: every parameter once, and bit-exact conversion in both directions."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from helpers.weight_cases import ALL, LAYERS, MODELS, draw, jax_module, same_bits, torch_module
from mc_core import weights
from mc_core.pretrained import describe, one_dtype, read_description
from mc_core.weights import leaves, table
from parity.weights import jax_weights, load_jax, load_torch, to_jax, to_torch, torch_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def test_weight_table_is_one_to_one():
    for side in ("jax", "torch"):
        names = [getattr(row, side) for row in table()]
        assert len(set(names)) == len(names)


def test_weight_table_rows_occur_in_modules():
    names = {name for config in ALL.values() for name in torch_module(config).state_dict()}
    used = {weights._INDEX.sub("#", name) for name in names}
    # A block may contain any layer, so blocks have the parameters of all layers.
    used |= {f"blocks.#.mixer.{row.torch}" for row in weights.layer_rows() if row.torch in used}
    assert {row.torch for row in table()} == used


@pytest.mark.parametrize("name", ALL)
def test_both_frameworks_have_the_same_parameters(name):
    config = ALL[name]
    ours, theirs = jax_weights(jax_module(config)), torch_weights(torch_module(config))
    assert leaves(to_torch(ours)) == leaves(theirs)
    assert leaves(to_jax(theirs)) == leaves(ours)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_weight_conversion_round_trips_bit_exactly(name, dtype):
    config = ALL[name]
    drawn = draw(config, dtype)
    first, second = torch_module(config, DTYPES[dtype]), torch_module(config, DTYPES[dtype])
    ours = jax_module(config, jnp.dtype(dtype))
    load_torch(first, drawn)
    load_jax(ours, to_jax(torch_weights(first)))
    load_torch(second, to_torch(jax_weights(ours)))
    assert same_bits(torch_weights(second), drawn)
    assert same_bits(to_jax(to_torch(jax_weights(ours))), jax_weights(ours))


def test_bfloat16_preserves_nan_payloads():
    bits = np.array([0x7F80, 0xFF80, 0x7FC1, 0x8000, 0x0001], np.uint16)  # ±inf, a NaN, -0, tiny
    config = LAYERS["linear"]
    drawn = draw(config, "bfloat16")
    drawn["output_norm.scale"].reshape(-1)[:5] = bits.view(jnp.bfloat16)
    theirs = torch_module(config, torch.bfloat16)
    ours = jax_module(config, jnp.bfloat16)
    load_torch(theirs, drawn)
    load_jax(ours, to_jax(torch_weights(theirs)))
    assert same_bits(to_torch(jax_weights(ours)), drawn)


def test_converted_weights_are_copies():
    module = torch_module(LAYERS["linear"])
    before = torch_weights(module)
    with torch.no_grad():
        module.q_proj.weight.zero_()
    assert np.abs(before["q_proj.weight"]).sum() > 0


def corrupt(flat, kernel):
    """Remove one parameter, add one, and change shape and dtype of others."""
    flat = dict(flat)
    flat.pop("norm.scale")
    flat["blocks.0.mixer.q_prj.kernel"] = np.ones(3, np.float32)
    flat["blocks.1.ffn_norm.scale"] = np.ones(7, np.float32)
    flat[kernel] = flat[kernel].astype(np.float64)
    return flat


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_set_weights_lists_all_errors_and_changes_nothing(framework):
    config = MODELS["tied"]
    make, get, load, kernel = {
        "jax": (jax_module, jax_weights, load_jax, "blocks.0.ffn.up_proj.kernel"),
        "torch": (torch_module, torch_weights, load_torch, "blocks.0.ffn.up_proj.weight"),
    }[framework]
    module = make(config)
    before = get(module)
    with pytest.raises(ValueError, match="weights do not match") as caught:
        load(module, corrupt(before, kernel))
    shape = list(before[kernel].shape)
    assert str(caught.value).split("\n  ") == [
        "weights do not match:",
        "missing norm.scale float32[8]",
        "unexpected blocks.0.mixer.q_prj.kernel float32[3]",
        *sorted(
            [
                "must be blocks.1.ffn_norm.scale float32[8], is float32[7]",
                f"must be {kernel} float32{shape}, is float64{shape}",
            ],
            key=lambda line: list(before).index(line.split()[2]),
        ),
    ]
    assert same_bits(get(module), before)


def test_unknown_weights_are_listed():
    flat = draw(MODELS["tied"])
    flat["blocks.0.mixer.w_proj.weight"] = np.ones((2, 2))
    flat["head.bias"] = np.ones(2)
    flat["norm.scale"] = np.ones((1, 8))
    with pytest.raises(ValueError, match="weights do not match") as caught:
        to_jax(flat)
    assert str(caught.value).split("\n  ")[1:] == [
        "must have 1 axes: norm.scale float64[1, 8]",
        "unexpected blocks.0.mixer.w_proj.weight float64[2, 2]",
        "unexpected head.bias float64[2]",
    ]
    with pytest.raises(ValueError, match=r"unexpected embed\.weight"):
        to_torch({"embed.weight": np.ones((2, 2))})


@pytest.mark.parametrize("name", ["titans", "free"])
def test_description_round_trips(name):
    assert read_description(describe(ALL[name]), type(ALL[name])) == ALL[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2: must be 1"),
        ({"module": "Transformer"}, "contains a 'Transformer': must be one of MemoryCachingLayer"),
        ({"module": "LanguageModel"}, "unknown key 'd_model'"),
        ({"config": {"d_model": 8, "num_heads": 3}}, "d_model = 8: must be a multiple"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
)
def test_description_is_strict(change, message):
    config = LAYERS["linear"]
    with pytest.raises(ValueError, match=message):
        read_description(describe(config) | change, type(config))


def test_mixed_dtypes_are_rejected():
    flat = draw(LAYERS["linear"])
    flat["q_proj.weight"] = flat["q_proj.weight"].astype(np.float64)
    with pytest.raises(ValueError, match="float32, float64: must have the same dtype"):
        one_dtype(leaves(flat))
