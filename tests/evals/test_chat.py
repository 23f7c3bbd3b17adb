"""Prompts in a chat format: found out by trying, refused in one sentence, set aside on request."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from farspan import FarspanError
from farspan.runtime.models import choose_chat, encode_prompt, prompt_ids

BOS, INST, END = 1, 3, 4
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[answer]"
BROKEN = {
    "raises": ("{{ raise_exception('system role wanted') }}", "system role wanted"),
    "syntax": ("{% for m in messages %}{{ m['content'] }", "unexpected"),
    "no default": ({"rag": TEMPLATE, "tool_use": TEMPLATE}, "rag"),
    "undefined": ("{{ messages[0]['content'] + nowhere }}", "nowhere"),
}


class Tekken:
    """A tokenizer as Mistral's own are: a chat format without a `chat_template`, and special tokens that no
    text becomes."""

    chat_template = None
    eos_token_id = 2

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool = True) -> Any:
        return SimpleNamespace(input_ids=[BOS] * add_special_tokens + [ord(letter) for letter in text])

    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool, tokenize: bool) -> Any:
        assert add_generation_prompt and [message["role"] for message in conversation] == ["user"]
        if not tokenize:
            return "[INST]" + conversation[0]["content"] + "[/INST]"
        return {"input_ids": [BOS, INST, *map(ord, conversation[0]["content"]), END]}


def with_template(tokenizer: Any, template: Any) -> Any:
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def test_a_chat_format_without_a_template_is_found_by_trying():
    hello = [*map(ord, "Hello")]
    assert encode_prompt(Tekken(), "Hello").tolist() == [[BOS, INST, *hello, END]]
    assert encode_prompt(Tekken(), "Hello", chat=True).tolist() == [[BOS, INST, *hello, END]]
    assert encode_prompt(Tekken(), "Hello", chat=False).tolist() == [[BOS, *hello]]
    assert prompt_ids(Tekken(), "Hello", " It") == [BOS, INST, *hello, END, *map(ord, " It")]
    plain = choose_chat(Tekken(), False)
    assert prompt_ids(plain, "Hello", " It") == [BOS, *hello, *map(ord, " It")]


def test_a_tokenizer_without_a_chat_format(smollm2_tokenizer):
    bare = with_template(smollm2_tokenizer, None)
    text = smollm2_tokenizer("Hello there").input_ids
    assert encode_prompt(bare, "Hello there").tolist() == [text]
    assert choose_chat(bare, False) is bare and choose_chat(bare, None) is bare
    with pytest.raises(FarspanError, match="no chat template: leave --chat out, or use --no-chat"):
        encode_prompt(bare, "Hello there", chat=True)


def test_a_chat_format_is_set_aside_on_a_copy(smollm2_tokenizer):
    plain = choose_chat(smollm2_tokenizer, False)
    assert prompt_ids(plain, "Hello", " It") == smollm2_tokenizer("Hello It").input_ids
    assert smollm2_tokenizer.chat_template and len(prompt_ids(smollm2_tokenizer, "Hello")) > 20
    assert choose_chat(smollm2_tokenizer, True) is choose_chat(smollm2_tokenizer, None) is smollm2_tokenizer


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_cannot_be_applied_ends_in_one_sentence(smollm2_tokenizer, name):
    template, reason = BROKEN[name]
    broken = with_template(smollm2_tokenizer, template)
    for chat in (None, True):
        with pytest.raises(FarspanError, match="use --no-chat") as error:
            encode_prompt(broken, "Hello", chat=chat)
        assert reason in str(error.value) and "\n" not in str(error.value)
    assert encode_prompt(broken, "Hello", chat=False).tolist() == [smollm2_tokenizer("Hello").input_ids]


def test_a_template_that_refuses_one_message_ends_in_the_same_sentence(smollm2_tokenizer):
    """The trial's short message passes, the prompt does not."""
    picky = "{% if messages[0]['content'] | length > 9 %}{{ raise_exception('too long') }}{% endif %}ok"
    tokenizer = with_template(smollm2_tokenizer, picky)
    assert encode_prompt(tokenizer, "short").tolist() == [smollm2_tokenizer("ok").input_ids]
    with pytest.raises(FarspanError, match=r"cannot be applied \(too long\): use --no-chat"):
        encode_prompt(tokenizer, "a long message")


def test_named_templates_use_the_default_one(smollm2_tokenizer):
    named = with_template(smollm2_tokenizer, {"default": TEMPLATE, "rag": "other"})
    text = smollm2_tokenizer.bos_token + "[user]Hello[answer]"
    assert encode_prompt(named, "Hello").tolist() == [smollm2_tokenizer(text).input_ids]
    dated = {"default": "{{ strftime_now('%Y') }}" + TEMPLATE}
    ids = prompt_ids(with_template(smollm2_tokenizer, dated), "Hello", clock=False)
    assert ids == smollm2_tokenizer("2024" + text).input_ids
