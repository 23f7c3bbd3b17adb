"""Prompts as token ids: a user's message in the chat format of the model, or the text alone.

Whether a tokenizer has a chat format is found out by trying. Mistral's own tokenizers (tekken.json) have one
and no `chat_template`, and they never read special tokens out of a text; others have a template that cannot
be applied.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from ...attention.errors import FarspanError

# Some chat templates (Llama 3.2, SmolLM3) write today's date into the prompt. Put before such a template,
# this macro hides the clock and gives the day Llama's own template falls back to. What follows `endmacro`
# keeps a newline that begins the template from being trimmed.
_CLOCK = "strftime_now"
_DAY = {"%d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024", "%y": "24"}
_STOPPED_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in _DAY.items())
    + " }}{%- endmacro %}{{ '' }}"
)


def has_chat(tokenizer: Any) -> bool:
    """Whether the tokenizer can put a user's message into a chat format.

    Raises:
        FarspanError: it has a chat template that cannot be applied.
    """
    try:
        _apply(tokenizer, "Hi", tokenize=True)
    except Exception as error:
        if _template(tokenizer):
            raise _unusable(error) from error
        return False
    return True


def choose_chat(tokenizer: Any, chat: bool | None) -> Any:
    """The tokenizer as `chat` asks for it: None as it is, False a copy of it that has no chat format (the
    tokenizer itself, where it has none anyway).

    Raises:
        FarspanError: True without a chat format; True or None with a template that cannot be applied.
    """
    if chat is False:
        try:
            there = has_chat(tokenizer)
        except FarspanError:
            there = True
        return _without_chat(tokenizer) if there else tokenizer
    if not has_chat(tokenizer) and chat:
        raise FarspanError("This model's tokenizer has no chat template; leave --chat out, or use --no-chat.")
    return tokenizer


def prompt_ids(tokenizer: Any, user: str, opening: str = "", *, clock: bool = True) -> list[int]:
    """Token ids of a prompt, [T]: the user's message, in the chat format if the tokenizer has one, and the
    opening words of the answer.

    clock: whether a template that asks for today's date gets it; else the prompt is the same on every day.

    Raises:
        FarspanError: the tokenizer has a chat template that cannot be applied.
    """
    if not has_chat(tokenizer):
        ids = list(tokenizer(user + opening, add_special_tokens=True, verbose=False).input_ids)
        if len(ids) > 1 and ids[-1] == getattr(tokenizer, "eos_token_id", None):
            ids.pop()  # a prompt is open at its end
        return ids
    try:
        if not _template(tokenizer):  # special tokens are written as ids alone
            return [*_apply(tokenizer, user, tokenize=True)["input_ids"], *plain_ids(tokenizer, opening)]
        template = tokenizer.get_chat_template()
        stopped = {} if clock or _CLOCK not in template else {"chat_template": _STOPPED_CLOCK + template}
        text = _apply(tokenizer, user, tokenize=False, **stopped)
    except Exception as error:
        raise _unusable(error) from error
    return plain_ids(tokenizer, text + opening)  # the template has written its special tokens itself


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of the text alone, [T], no special tokens added."""
    # Not verbose: a size tried on the way may exceed the tokenizer's model_max_length, which is no cause for
    # a warning.
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def encode_prompt(tokenizer: Any, text: str, *, chat: bool | None = None) -> Any:
    """Token ids [1, T] of a prompt; chat=None uses the chat template if the tokenizer has one.

    Raises:
        FarspanError: chat=True without a template, a template that cannot be applied (and chat is not
            False), or a prompt of no tokens.
    """
    import torch

    ids = prompt_ids(choose_chat(tokenizer, chat), text)
    if not ids:
        raise FarspanError("The prompt is empty; give at least one word.")
    return torch.tensor([ids])


def _apply(tokenizer: Any, user: str, **how: Any) -> Any:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], add_generation_prompt=True, **how
    )


def _template(tokenizer: Any) -> Any:
    return getattr(tokenizer, "chat_template", None)


def _without_chat(tokenizer: Any) -> Any:
    plain = copy.copy(tokenizer)
    plain.chat_template, plain.apply_chat_template = None, _set_aside
    return plain


def _set_aside(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("The chat format was set aside.")


def _unusable(error: Exception) -> FarspanError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return FarspanError(
        f"The chat template of this model's tokenizer cannot be applied ({reason.rstrip('.')}); use "
        "--no-chat to run the prompt without it, or correct the template."
    )
