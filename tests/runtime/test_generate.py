"""All that generate() and plain calls do, patched: where attention is dense, the same tokens as without."""

from __future__ import annotations

import copy
import threading

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
    snapshot,
)
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

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


# --- plain calls and caches -------------------------------------------------------------------------------


def by_hand(model, inputs, cache, new=8):
    """Greedy decoding with plain calls and the user's own cache."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    step, tokens = ids, []
    for _ in range(new):
        with torch.no_grad():
            out = model(step, attention_mask=mask, past_key_values=cache, position_ids=_positions(mask, step))
        cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        tokens.append(step)
    return torch.cat(tokens, 1)


def _positions(mask, step):
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]


@pytest.mark.parametrize("kind", ["none", "bare", "with config"])
def test_the_users_own_caches(model, kind):
    def cache():
        made = {"bare": DynamicCache, "with config": lambda: DynamicCache(config=model.config)}
        return None if kind == "none" else made[kind]()

    expected = by_hand(model, padded(), cache(), 20)
    assert torch.equal(expected, decode(model, padded(), 20))
    with farspan.patch(model):
        assert torch.equal(by_hand(model, padded(), cache(), 20), expected)
        if kind != "none":
            assert torch.equal(decode(model, padded(), 20, past_key_values=cache()), expected)
    with farspan.patch(model, SPARSE) as patched:
        sparse = by_hand(model, padded(), cache(), 20)
        assert torch.equal(sparse, decode(model, padded(), 20))
    assert patched.report().summary["decode_density"] < 1


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


def test_several_turns_in_one_cache(model):
    turns = [prompt(2, n, seed=n) for n in (30, 21, 5)]

    def talk(cache):
        said, past = [], torch.zeros(2, 0, dtype=torch.long)
        for turn in turns:
            past = torch.cat([past, turn], 1)
            out = model.generate(
                past,
                attention_mask=torch.ones_like(past),
                past_key_values=cache,
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=PAD,
                return_dict_in_generate=True,
            )
            said.append(out.sequences[:, past.shape[1] :])
            past, cache = out.sequences, out.past_key_values
        return torch.cat(said, 1)

    expected = talk(DynamicCache(config=model.config))
    with farspan.patch(model):
        assert torch.equal(talk(DynamicCache(config=model.config)), expected)
        assert torch.equal(talk(DynamicCache()), expected)
        assert torch.equal(talk(None), expected)
    for spec in SELECTIVE:
        with farspan.patch(model, spec) as patched:
            assert talk(DynamicCache(config=model.config)).shape == expected.shape
        assert min(v for k, v in patched.report().summary.items() if k.endswith("density")) < 1


def test_a_cache_outlives_the_patch():
    model, ids, more = shared("llama"), prompt(2, 40), prompt(2, 3, seed=5)
    with torch.no_grad():
        cache = model(ids, past_key_values=DynamicCache(config=model.config)).past_key_values
        expected = model(more, past_key_values=cache).logits
        for spec in ("dense", SPARSE, "recycled:k=16,stride=4"):
            with farspan.patch(model, spec):
                cache = model(ids).past_key_values
            assert close(model(more, past_key_values=cache).logits, expected)
            assert cache.get_seq_length() == 43
            cache.crop(-3)
            assert close(model(more, past_key_values=cache).logits, expected)
            with farspan.patch(model, "dense"):
                cache.crop(-3)
                assert close(model(more, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("first", ["unpatched", "dense", "recycled:k=16,stride=4", SPARSE])
@pytest.mark.parametrize("then", ["dense", "recycled:k=16,stride=4", SPARSE, "window:w=12,sinks=2"])
def test_a_prefix_cache_is_copied_and_used_again(model, first, then):
    """A prefix read in full under one patch, deep-copied, continues under another as if that had read it."""
    prefix, ends = prompt(1, 40), [prompt(1, n, seed=n) for n in (20, 3)]
    if then.startswith("recycled"):
        ends = ends[
            :1
        ]  # a shorter end continues the set that the prefix's last query chose, where there is one

    def continue_(cache, end):
        ids = torch.cat([prefix, end], 1)
        return decode(model, ids, 8, past_key_values=cache)

    def read():
        with torch.no_grad():
            return model(prefix, past_key_values=DynamicCache(config=model.config)).past_key_values

    with farspan.patch(model, decode=then):
        fresh = [continue_(read(), end) for end in ends]
    if first == "unpatched":
        cache = read()
    else:
        with farspan.patch(model, first):
            cache = read()
    before = [layer.keys.clone() for layer in cache.layers]
    copies = [copy.deepcopy(cache) for _ in ends]
    with farspan.patch(model, decode=then):
        for end, one, expected in zip(ends, copies, fresh, strict=True):
            again = copy.deepcopy(cache)
            assert torch.equal(continue_(one, end), expected)
            assert torch.equal(continue_(again, end), expected)
    assert all(torch.equal(layer.keys, old) for layer, old in zip(cache.layers, before, strict=True))
    assert cache.get_seq_length() == 40


def test_a_methods_state_is_dropped_when_it_missed_tokens():
    """A cache that an unpatched step has extended is a new one for the method: its next step is full."""
    model, ids, more = shared("llama"), prompt(1, 40), prompt(1, 1, seed=2)
    spec = "recycled:k=16,stride=1000"

    def step(cache):
        with torch.no_grad():
            return model(more, past_key_values=cache).logits

    with farspan.patch(model, spec), torch.no_grad():
        cache = model(ids).past_key_values
        step(cache)
    for _ in range(5):
        step(cache)  # unpatched
    plain = copy.deepcopy(cache)
    expected = step(plain)
    with farspan.patch(model, spec) as patched:
        assert close(step(cache), expected)
        assert patched.report().summary["decode_density"] == 1.0
        step(cache)
        assert patched.report().summary["decode_density"] < 1


@pytest.mark.parametrize("spec", ["dense", *SELECTIVE])
def test_inference_mode_and_no_grad_mix(model, spec):
    ids, more = prompt(2, 40), [prompt(2, 1, seed=s) for s in range(4)]

    def run(modes):
        cache = DynamicCache(config=model.config)
        out = []
        for mode, x in zip(modes, [ids, *more], strict=True):
            with mode():
                out.append(model(x, past_key_values=cache).logits)
                cache.reorder_cache(torch.tensor([1, 0]))
        return torch.cat(out, 1).clone()

    with farspan.patch(model, spec):
        expected = run([torch.no_grad] * 5)
        mixed = [torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad, torch.no_grad]
        assert torch.equal(run(mixed), expected)
        assert torch.equal(run([torch.no_grad, torch.inference_mode, *mixed[:3]]), expected)


def test_reset_and_reuse_of_a_cache(model):
    for spec in ("dense", *SELECTIVE):
        with farspan.patch(model, spec), torch.no_grad():
            expected = model(prompt(2, 40)).logits
            cache = model(prompt(3, 50, seed=4)).past_key_values
            cache.reset()
            assert cache.get_seq_length() == 0
            assert close(model(prompt(2, 40), past_key_values=cache).logits, expected)


@pytest.mark.parametrize("spec", ["dense", *SELECTIVE])
def test_rows_of_a_cache_follow_select_and_repeat(spec):
    model, ids, more = shared("llama"), padded(), [prompt(3, 1, seed=s) for s in range(6)]

    def run(rows, change):
        tokens = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}
        mask = tokens["attention_mask"]
        with torch.no_grad():
            cache = model(**tokens).past_key_values
            for x in more[:2]:
                mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
                model(x, attention_mask=mask, past_key_values=cache)
            change(cache)
            out, mask = [], mask[rows]
            for x in more[2:]:
                mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
                out.append(model(x[rows], attention_mask=mask, past_key_values=cache).logits)
        return torch.cat(out, 1)

    with farspan.patch(model, spec):
        plain = run([0, 1, 2], lambda cache: None)
        for rows, change in (
            ([2, 0], lambda cache: cache.batch_select_indices(torch.tensor([2, 0]))),
            ([0, 2], lambda cache: cache.batch_select_indices(torch.tensor([True, False, True]))),
            ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
            ([1, 1, 0], lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0]))),
        ):
            assert close(run(rows, change), plain[rows])


# --- several patches --------------------------------------------------------------------------------------


def test_models_that_share_a_config_are_apart():
    a = make("llama")
    b, c = LlamaForCausalLM(a.config).eval(), LlamaForCausalLM(a.config).eval()
    for other in (b, c):
        other.load_state_dict(a.state_dict())
    assert a.config is b.config is c.config
    expected = decode(c, padded())
    alone = {}
    for spec in ("window:w=12,sinks=2", SPARSE):
        with farspan.patch(a, spec):
            alone[spec] = decode(a, padded())
    before = snapshot(c)
    with farspan.patch(a, "window:w=12,sinks=2") as first:
        second = farspan.patch(b, SPARSE)
        assert snapshot(c) == before
        for _ in range(2):
            assert torch.equal(decode(a, padded()), alone["window:w=12,sinks=2"])
            assert torch.equal(decode(b, padded()), alone[SPARSE])
            assert torch.equal(decode(c, padded()), expected)
        assert first.report().summary["prefill_density"] < 1 == second.report().summary["prefill_density"]
    assert torch.equal(decode(a, padded()), expected)
    assert torch.equal(decode(b, padded()), alone[SPARSE])  # the other patch is still there
    second.remove()
    assert torch.equal(decode(b, padded()), expected)
    assert snapshot(c) == before


def test_nested_with_blocks_of_two_models():
    a, b = shared("llama"), shared("qwen3")
    expected = decode(a, padded()), decode(b, padded())
    before = snapshot(a), snapshot(b)
    with farspan.patch(a, SPARSE) as outer:
        sparse = decode(a, padded())
        with farspan.patch(b, "window:w=12,sinks=2") as inner:
            assert torch.equal(decode(a, padded()), sparse)
            outer.remove()
            assert torch.equal(decode(a, padded()), expected[0])
            decode(b, padded())
        assert inner.report().summary["decode_density"] < 1
        assert torch.equal(decode(b, padded()), expected[1])
    assert (snapshot(a), snapshot(b)) == before


def test_threads_share_a_patched_model():
    model = shared("llama")
    batches = [padded((41 - i, 29 + i), seed=i) for i in range(4)]
    with farspan.patch(model, SPARSE):
        expected = [decode(model, batch, 12) for batch in batches]
        got: list = [None] * len(batches)

        def work(i):
            got[i] = [decode(model, batches[i], 12) for _ in range(3)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for runs, one in zip(got, expected, strict=True):
        assert runs is not None and all(torch.equal(run, one) for run in runs)


def test_an_error_in_the_middle_leaves_the_patch_usable():
    model, ids = shared("llama"), prompt(1, 40)
    with farspan.patch(model, SPARSE):
        expected = decode(model, ids)
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decode(model, ids)
        hook.remove()
        assert torch.equal(decode(model, ids), expected)


def test_a_patched_model_is_not_copied_but_saved(tmp_path):
    model = make("llama")
    with farspan.patch(model, SPARSE):
        with pytest.raises(farspan.FarspanError, match="remove"):
            copy.deepcopy(model)
        model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert close(logits(again.eval(), prompt()), logits(model, prompt()))
    assert copy.deepcopy(model).config.to_dict() == model.config.to_dict()


# --- training ---------------------------------------------------------------------------------------------


def gradients(model, batch, **how):
    # The first token of a row would be told from padding, which is nobody's business.
    labels = batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(1) <= 1, -100)
    model.zero_grad()
    loss = model(**batch, labels=labels, **how).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), grads


def assert_same_gradients(got, expected):
    assert torch.allclose(got[0], expected[0], rtol=1e-5)
    assert set(got[1]) == set(expected[1])
    for name, grad in expected[1].items():
        assert (got[1][name] - grad).norm() <= 1e-4 * max(grad.norm(), 1e-3), name


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3"])
def test_dense_gradients_are_the_models_own(name, use_cache):
    model, batch = make(name).train(), padded((40, 33))
    expected = gradients(model, batch, use_cache=use_cache)
    with farspan.patch(model):
        assert_same_gradients(gradients(model, batch, use_cache=use_cache), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, batch = make("llama").train(), padded((40, 33))
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for spec in ("dense", "block_topk:k=4096", "block_topk:k=none,fraction=1.0,block=8"):
        with farspan.patch(model, spec):
            assert_same_gradients(gradients(model, batch), expected)


def test_sparse_gradients_are_those_of_the_masked_model():
    """The unpatched model under a 4-D mask of the same pairs is the oracle."""
    from farspan.attention.selection import Window

    model, ids = make("llama").train(), prompt(2, 40)
    allowed = Window(size=12, sinks=2).to_mask(40, 40, None, 2)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
    loss.backward()
    expected = loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}
    with farspan.patch(model, "window:w=12,sinks=2"):
        got = gradients(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert_same_gradients(got, expected)


def test_block_topk_gradients_are_those_of_its_own_blocks(monkeypatch):
    """What the method chose, as a 4-D mask per layer on the unpatched model, gives the same gradients."""
    from farspan.attention.sparse.block_topk import BlockTopK

    model, ids = make("llama", num_hidden_layers=1).train(), prompt(2, 64)
    chosen = []
    select = BlockTopK.select_prefill

    def spy(self, q, keys):
        index = select(self, q, keys)
        chosen.append(index.to_mask(q.shape[2], keys.length))
        return index

    monkeypatch.setattr(BlockTopK, "select_prefill", spy)
    with farspan.patch(model, "block_topk:k=24,block=8") as patched:
        got = gradients(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert patched.report().summary["prefill_density"] < 1
    allowed = torch.cat(chosen).repeat_interleave(4 // chosen[0].shape[1], 1)  # one mask per query head
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    model.set_attn_implementation("eager")
    loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
    loss.backward()
    assert_same_gradients(got, (loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
