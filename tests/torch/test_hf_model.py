"""`MemoryCachingForCausalLM`: a `LanguageModel` with the interface of transformers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from helpers.hf_models import LAYERS, VOCABULARY, draw_ids, hf_model, left_padded
from mc_core import MCConfig, ModelConfig
from mc_torch import LanguageModel
from mc_torch.hf import MemoryCachingConfig, MemoryCachingForCausalLM
from mc_torch.hf.modeling import CACHE

IDS = draw_ids(2, 11)


@pytest.mark.parametrize("name", LAYERS)
def test_logits_and_parameters_are_those_of_the_language_model(name):
    model = hf_model(name)
    torch.manual_seed(0)
    plain = LanguageModel(model.config.to_model_config())
    for (key, one), other in zip(model.model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), key
    assert torch.equal(model(IDS).logits, plain(IDS))
    for keep, places in ((3, [8, 9, 10]), (torch.tensor([1, 5]), [1, 5])):
        kept = model(IDS, logits_to_keep=keep).logits
        torch.testing.assert_close(kept, plain(IDS)[:, places])


def test_loss_is_shifted_and_ignores_minus_100():
    model, labels = hf_model(), IDS.clone()
    labels[:, :4] = -100
    logits = model(IDS).logits
    expected = F.cross_entropy(logits[:, 3:-1].flatten(0, 1), IDS[:, 4:].flatten())
    torch.testing.assert_close(model(IDS, labels=labels).loss, expected)
    summed = model(IDS, labels=labels, num_items_in_batch=7).loss
    torch.testing.assert_close(summed, expected * 14 / 7)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_results_do_not_depend_on_padding(name, use_cache):
    """Logits and gradients of rows with padding on the left, on the right and inside."""
    model = hf_model(name)
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[0, :4], mask[1, -4:], mask[2, 2:6] = 0, 0, 0
    ids = draw_ids(3, 11)
    out = model(ids, attention_mask=mask, use_cache=use_cache).logits
    for row in range(3):
        read = mask[row] == 1
        expected = model(ids[row : row + 1, read]).logits
        torch.testing.assert_close(out[row : row + 1, read], expected, rtol=1e-5, atol=1e-6)
    loss = out[mask == 1].square().sum()
    gradient = torch.autograd.grad(loss, model.model.embed.weight)[0]
    assert torch.isfinite(gradient).all()


def test_hidden_states_and_embeddings():
    model = hf_model()
    out = model(IDS, output_hidden_states=True)
    first, _, last = out.hidden_states
    assert torch.equal(first, model.get_input_embeddings()(IDS))
    torch.testing.assert_close(out.logits, last @ model.model.embed.weight.T)
    assert torch.equal(model(inputs_embeds=first).logits, out.logits)
    padded = left_padded([IDS[0], IDS[1, 4:]])
    whole = model(**padded, output_hidden_states=True).hidden_states[1]
    alone = model(IDS[1:, 4:], output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(whole[1:, 4:], alone)


@pytest.mark.parametrize("tie", [True, False])
def test_saved_models_load_with_auto_classes(tie, tmp_path):
    model = hf_model(tie_embeddings=tie)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_model_config() == model.config.to_model_config()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, MemoryCachingForCausalLM)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {x.dtype for x in half.parameters()} == {torch.bfloat16}
    assert half(IDS).logits.dtype == torch.float32


def test_missing_parameters_are_drawn_and_others_loaded():
    model = hf_model(tie_embeddings=False)
    state = {key: x for key, x in model.state_dict().items() if "q_proj" not in key}
    loaded = MemoryCachingForCausalLM.from_pretrained(None, config=model.config, state_dict=state)
    drawn, kept = loaded.model.blocks[0].mixer, model.model.blocks[0].mixer
    assert 0.5 < drawn.q_proj.weight.std() * 8**0.5 < 1.5
    assert torch.equal(drawn.k_proj.weight, kept.k_proj.weight)


@pytest.mark.parametrize("tie", [True, False])
def test_resized_vocabulary(tie, tmp_path):
    model = hf_model(tie_embeddings=tie)
    before = model(IDS).logits
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    after = model(IDS + 3).logits
    assert after.shape[-1] == VOCABULARY + 3
    assert torch.equal(model(IDS).logits[..., :VOCABULARY], before)
    model.post_init()  # must not draw the resized weights again
    assert torch.equal(model(IDS + 3).logits, after)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS + 3).logits, after)


def gradients(model, **options):
    model.zero_grad()
    model(IDS, labels=IDS, **options).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_does_not_change_gradients(reentrant):
    model = hf_model().train()
    plain, calls = gradients(model), []
    model._set_gradient_checkpointing(
        True,
        lambda *args: (
            calls.append(1),
            torch.utils.checkpoint.checkpoint(*args, use_reentrant=reentrant),
        )[1],
    )
    for one, other in zip(gradients(model), plain, strict=True):
        assert torch.equal(one, other)
    assert len(calls) == 2  # blocks


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    model = hf_model().train()
    plain = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.ones_like(IDS)
    model.zero_grad()
    out = compiled(input_ids=IDS, attention_mask=mask, labels=IDS)
    out.loss.backward()
    for parameter, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_configuration_round_trip_and_errors():
    config = ModelConfig(11, 2, MCConfig(8, 2), mixers=("memory", "attention"))
    saved = MemoryCachingConfig.from_model_config(config, tokenizer="bytes")
    loaded = MemoryCachingConfig.from_dict(saved.to_dict())
    assert (loaded.to_model_config(), loaded.tokenizer) == (config, "bytes")
    assert (loaded.num_hidden_layers, loaded.hidden_size, loaded.num_attention_heads) == (2, 8, 2)
    loaded.vocab_size = 13
    assert loaded.to_model_config() == replace(config, vocab_size=13)
    with pytest.raises(ValueError, match="segment_size = 0: must be"):
        MemoryCachingConfig(layer=MCConfig(8, 2).to_dict() | {"segment_size": 0})


ERRORS = {
    "id": ({"input_ids": IDS + VOCABULARY}, "must be in 0..36"),
    "cache": (
        {"input_ids": IDS, CACHE: DynamicCache()},
        "is a DynamicCache: must be a StreamCache",
    ),
    "none": ({}, "exactly one must be given"),
    "mask": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 11, 11)},
        r"attention_mask has shape \(2, 1, 11, 11\): must be \[2, s\] with s >= 11",
    ),
    "packed": (
        {"input_ids": IDS, "position_ids": torch.tensor([[*range(6), *range(5)]]).repeat(2, 1)},
        "position_ids: must count up by 1",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments_are_refused(case):
    arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as error:
        hf_model()(**arguments)
    assert "\n" not in str(error.value)
