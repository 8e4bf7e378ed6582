"""`generate` of transformers on the stream cache."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast, TextStreamer

from helpers.hf_models import LAYERS, draw_ids, hf_model, left_padded
from mc_torch import generate
from mc_torch.hf import StreamCache
from mc_torch.hf.modeling import CACHE
from train.data.hf_tokenizer import byte_tokenizer

NEW = 6
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
PROMPTS = [draw_ids(7, seed=1), draw_ids(3, seed=2), draw_ids(10, seed=3)]


@pytest.mark.parametrize("name", LAYERS)
def test_greedy_decoding_of_padded_prompts_equals_generate(name):
    model = hf_model(name)
    inputs = left_padded(PROMPTS)
    expected = torch.stack(list(generate(model.model, [x.tolist() for x in PROMPTS], NEW)), 1)
    assert torch.equal(model.generate(**inputs, **OPTIONS)[:, 10:], expected)
    chunked = model.generate(**inputs, **OPTIONS, prefill_chunk_size=4)
    assert torch.equal(chunked[:, 10:], expected)


@pytest.mark.parametrize("name", ["linear-ssc-conv", "linear-fenwick"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"do_sample": True, "num_beams": 2}],
    ids=["beams", "sampling", "sampled beams"],
)
def test_cache_does_not_change_what_is_generated(name, options):
    """Beams are reordered in the cache; samples have the same random numbers."""
    model, inputs = hf_model(name), left_padded(PROMPTS)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(**inputs, **OPTIONS | options, use_cache=use_cache))
    assert torch.equal(*results)
    assert not torch.equal(results[0], model.generate(**inputs, **OPTIONS))


def test_returned_cache_continues_the_stream():
    model, prompt = hf_model(), draw_ids(1, 9)
    whole = model.generate(prompt, **OPTIONS | {"max_new_tokens": 2 * NEW})
    first = model.generate(prompt, **OPTIONS, return_dict_in_generate=True)
    cache = first[CACHE]
    assert (cache.get_seq_length(), cache.batch_size) == (9 + NEW - 1, 1)
    assert cache.position.tolist() == [9 + NEW - 1]
    rest = model.generate(first.sequences, **OPTIONS, **{CACHE: cache})
    assert torch.equal(rest, whole)


def test_cached_calls_equal_the_whole_sequence():
    """Any split, with padding inside; rows may be selected and repeated between calls."""
    model, ids = hf_model(), draw_ids(2, 14)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 7:9] = 0, 0
    whole = model(ids, attention_mask=mask).logits
    cache, parts = StreamCache(cache_dtype=torch.float64), []
    for start, end in ((0, 5), (5, 6), (6, 14)):
        out = model(ids[:, start:end], attention_mask=mask[:, :end], **{CACHE: cache})
        parts.append(out.logits)
        assert out[CACHE] is cache
    read = mask == 1
    torch.testing.assert_close(torch.cat(parts, 1)[read], whole[read], rtol=1e-5, atol=1e-6)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([False, True, True, False]))
    longer = torch.cat([mask, mask[:, :1] * 0 + 1], 1)
    again = model(ids[:, :1], attention_mask=longer, **{CACHE: cache}).logits
    full = model(torch.cat([ids, ids[:, :1]], 1), attention_mask=longer).logits[:, -1:]
    torch.testing.assert_close(again, full, rtol=1e-5, atol=1e-6)
    cache.reset()
    assert (cache.batch_size, len(cache), cache.get_seq_length()) == (-1, 0, 0)


def test_out_of_range_id_in_a_step_gives_nan():
    model, cache = hf_model(), StreamCache()
    model(draw_ids(2, 3), **{CACHE: cache})
    model(torch.tensor([[99], [1]]), **{CACHE: cache})
    logits = model(draw_ids(2, 1), **{CACHE: cache}).logits
    assert torch.isnan(logits[0]).all()
    assert torch.isfinite(logits[1]).all()


def test_text_of_bytes_streams_and_stops(capsys):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())
    model = hf_model(vocab_size=256)
    inputs = tokenizer("caché", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [list("caché".encode())]
    plain = model.generate(**inputs, **OPTIONS)[0]
    new = tokenizer.decode(plain[6:])
    model.generate(**inputs, **OPTIONS, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == new + "\n"
    first = next(i for i, byte in enumerate(plain[6:].tolist()) if byte < 128)
    stop = chr(plain[6 + first])
    stopped = model.generate(**inputs, **OPTIONS, stop_strings=[stop], tokenizer=tokenizer)[0]
    assert torch.equal(stopped, plain[: 6 + first + 1])


def test_unsupported_generation_is_refused_in_one_line():
    model, prompt = hf_model(), draw_ids(1, 4)
    with pytest.raises(ValueError, match="cache_implementation = 'static': must be None"):
        model.generate(prompt, **OPTIONS, cache_implementation="static")
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(prompt, **OPTIONS, prompt_lookup_num_tokens=2)
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        StreamCache().crop(-1)
