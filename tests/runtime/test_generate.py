"""All that generate() and plain calls do, patched: where attention is dense, the same tokens as without."""

from __future__ import annotations

import pytest
import torch
from small_models import (
    BOS,
    EOS,
    PAD,
    VOCAB,
    close,
    decode,
    logits,
    make,
    padded,
    prompt,
    recipe,
    shared,
)
from transformers import PreTrainedTokenizerFast, pipeline

import farspan
from farspan.runtime.layer import NO_CACHE

SPARSE = "quest:k=16,page=4,dense_layers=0"
SELECTIVE = ["window:w=12,sinks=2", "recycled:k=16,stride=4", SPARSE, "block_topk:k=16,block=8"]
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 4},
    "beams that are returned": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "without a cache": {"use_cache": False},
    "in chunks": {"prefill_chunk_size": 16},
    "a cache by name": {"cache_implementation": "dynamic"},
}


@pytest.fixture(params=["llama", "gemma2"])
def model(request):
    return shared(request.param)


@pytest.mark.parametrize("way", WAYS)
def test_dense_generates_what_the_model_generates(model, way):
    def run():
        torch.manual_seed(3)
        return decode(model, padded(), 20, **WAYS[way])

    expected = run()
    with farspan.patch(model):
        assert torch.equal(run(), expected)
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("spec", ["dense", *SELECTIVE])
def test_sampling_is_repeatable_and_strategies_agree(spec):
    """The same seed gives the same text; one beam, or the best token alone, is greedy."""
    model = shared("llama")
    with farspan.patch(model, spec):
        torch.manual_seed(1)
        first = decode(model, padded(), do_sample=True)
        torch.manual_seed(1)
        assert torch.equal(decode(model, padded(), do_sample=True), first)
        greedy = decode(model, padded())
        assert torch.equal(decode(model, padded(), num_beams=1), greedy)
        assert torch.equal(decode(model, padded(), do_sample=True, top_k=1), greedy)


@pytest.mark.parametrize("spec", ["window:w=12,sinks=2", SPARSE, "recycled:k=16,stride=4"])
def test_beams_score_by_the_method(spec):
    """A beam's score is the sum of the log-probabilities that the same tokens have under teacher forcing."""
    model, ids, new = shared("llama"), prompt(2, 40), 8
    with farspan.patch(model, spec):
        out = model.generate(
            ids,
            max_new_tokens=new,
            num_beams=3,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[:, 40:]
        cache, score = None, torch.zeros(2)
        step = ids
        for t in range(new):
            with torch.no_grad():
                call = model(step, past_key_values=cache, use_cache=True)
            cache, step = call.past_key_values, tokens[:, t : t + 1]
            score += call.logits[:, -1].log_softmax(-1).gather(1, step)[:, 0]
    assert torch.allclose(score, out.sequences_scores, atol=1e-4)


@pytest.mark.parametrize("spec", ["dense", "window:w=12,sinks=2"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_assisted_decoding_is_greedy_decoding(name, spec):
    """Also where candidates are wrong and cropped. For decode-only methods see the next test."""
    model, near, far = shared(name), make(name), make(name, seed=7, num_hidden_layers=2, layer_types=None)
    with torch.no_grad():
        for p in near.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    ids = prompt(1, 40)
    ids[:, 20:] = ids[:, :20]  # repeats, so that prompt lookup has something to find
    with farspan.patch(model, spec):
        expected = decode(model, ids, 20)
        for how in ({"assistant_model": near}, {"assistant_model": far}, {"prompt_lookup_num_tokens": 4}):
            assert torch.equal(decode(model, ids, 20, **how), expected)
    if spec == "dense":
        assert torch.equal(decode(model, ids, 20), expected)


@pytest.mark.parametrize(
    "spec", ["dense", "window:w=12,sinks=2", SPARSE, "double_sparsity:k=16,dense_layers=0"]
)
def test_several_decode_tokens_at_once_are_those_tokens_one_by_one(spec):
    """Assisted decoding rests on it: a candidate knows nothing of later ones, and a crop leaves no trace.

    generate() itself checks its first candidates in the prompt's own call, which is prefill and not decode.
    """
    model, batch, more = shared("llama"), padded(), prompt(3, 12, seed=3)

    def call(cache, a, b):
        mask = torch.cat([batch["attention_mask"], torch.ones(3, b, dtype=torch.long)], 1)
        return logits(model, {"input_ids": more[:, a:b], "attention_mask": mask}, past_key_values=cache)

    needed = recipe("llama") if spec.startswith("double_sparsity") else None
    with farspan.patch(model, spec, recipe=needed), torch.no_grad():
        cache = model(**batch).past_key_values
        expected = torch.cat([call(cache, i, i + 1) for i in range(12)], 1)
        cache = model(**batch).past_key_values
        assert close(call(cache, 0, 12), expected)
        for rejected, size in ((7, 3), (1, 1), (6, 6), (12, 5)):
            cache.crop(-rejected)
            at = 12 - rejected
            assert close(call(cache, at, at + size), expected[:, at : at + size])
            if at + size < 12:
                call(cache, at + size, 12)


def test_assisted_decoding_with_a_patched_assistant_and_a_method_with_a_clock():
    model, assistant, ids = shared("llama"), make("llama", seed=7), prompt(1, 40)
    expected = decode(model, ids, 20)
    with farspan.patch(assistant, SPARSE), farspan.patch(model, "recycled:k=4096") as patched:
        assert torch.equal(decode(model, ids, 20, assistant_model=assistant), expected)
    assert patched.report().summary["decode_density"] == 1.0
    with farspan.patch(model, "recycled:k=16,stride=4") as patched:
        assert decode(model, ids, 20, assistant_model=assistant).shape == (1, 20)
    assert patched.report().summary["decode_density"] < 1


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {f"w{i}": i for i in range(3, VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **special)


def test_pipeline(tokenizer):
    model = shared("llama")
    texts = [" ".join(f"w{i}" for i in prompt(1, n, seed=n)[0].tolist()) for n in (30, 21, 26)]
    run = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    how = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False, "batch_size": 3}
    expected = run(texts, **how)
    with farspan.patch(model) as patched:
        assert run(texts, **how) == expected
        assert run(texts[0], **{**how, "batch_size": 1}) == expected[0]
    assert patched.report().summary["decode_density"] == 1.0
    with farspan.patch(model, "window:w=8,sinks=2") as patched:
        together = run(texts, **how)
        assert [run(text, **{**how, "batch_size": 1}) for text in texts] == together
    assert patched.report().summary["decode_density"] < 1
    assert run(texts, **how) == expected


# --- plain calls ------------------------------------------------------------------------------------------


def test_positional_arguments_and_embeddings():
    model, batch = shared("llama"), padded()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = logits(model, batch)
    with farspan.patch(model), torch.no_grad():
        assert close(model(ids, mask).logits, expected, mask)
        embedded = model.get_input_embeddings()(ids)
        assert close(model(inputs_embeds=embedded, attention_mask=mask).logits, expected, mask)
        assert close(model.model(ids, mask, return_dict=False)[0], model.model(ids, mask)[0])


@pytest.mark.parametrize("chunk", [None, 24])
def test_hidden_states_are_those_of_the_whole_prompt(model, chunk):
    with torch.no_grad():
        expected = model(prompt(2, 60), output_hidden_states=True).hidden_states
        with farspan.patch(model, prefill_chunk=chunk):
            got = model(prompt(2, 60), output_hidden_states=True).hidden_states
    assert len(got) == len(expected)
    assert all(a.shape == b.shape and close(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("chunk", [1, 8, 24, 1000])
def test_a_chunk_of_the_prompt_is_never_a_decode_step(chunk):
    model, ids = shared("llama"), prompt(2, 70)
    with farspan.patch(model, "recycled:k=16,stride=4", prefill_chunk=chunk) as patched:
        assert close(logits(model, ids), _unpatched(ids))
        assert patched.report().summary["decode_density"] is None
        assert patched.report().summary["prefill_density"] == 1.0
        decode(model, ids, 4)
    assert patched.report().summary["decode_density"] < 1


def _unpatched(ids):
    return logits(make("llama"), ids)


def test_no_cache_means_prefill_and_says_so():
    model, ids = shared("llama"), prompt(1, 40)
    expected = logits(model, ids)
    with farspan.patch(model, SPARSE) as patched:
        assert close(logits(model, ids, use_cache=False), expected)
        assert list(patched.report().summary["fallbacks"]) == [NO_CACHE]
    with (
        farspan.patch(model, SPARSE, strict=True),
        pytest.raises(farspan.FarspanError, match="strict=True forbids") as error,
    ):
        logits(model, ids, use_cache=False)
    assert NO_CACHE in str(error.value)
    with farspan.patch(model, "window:w=12,sinks=2", strict=True):
        logits(model, ids, use_cache=False)
