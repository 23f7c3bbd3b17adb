"""Prompts as token ids: a user's message in the chat format of the model, or the text alone.

Whether a tokenizer has a chat format is tested by applying it. Mistral's own tokenizers (tekken.json) have a
chat format but no `chat_template`, and they never parse special tokens in a text. Other tokenizers have a
template that cannot be applied.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from ...attention.errors import FarspanError

# Some chat templates (Llama 3.2, SmolLM3) write today's date into the prompt. This macro before such a
# template returns a fixed day instead: the default day of Llama's own template. The empty expression after
# `endmacro` keeps a newline at the beginning of the template from being trimmed.
_CLOCK = "strftime_now"
_MARK = "(the answer)"
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
    """The tokenizer for a setting of `chat`. For None or True it is the tokenizer itself. For False it is a
    copy without the chat format, or the tokenizer itself where it has none.

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
        raise FarspanError(
            "--chat was given, but this model's tokenizer has no chat template: leave --chat out, or use "
            "--no-chat."
        )
    return tokenizer


def prompt_ids(tokenizer: Any, user: str, opening: str = "", *, clock: bool = True) -> list[int]:
    """Token ids [T] of a prompt: the user's message, in the chat format if the tokenizer has one, followed by
    the opening words of the answer.

    clock: whether a template may write today's date; if not, the prompt is the same on every day.

    Raises:
        FarspanError: the tokenizer has a chat template that cannot be applied.
    """
    if not has_chat(tokenizer):
        ids = list(tokenizer(user + opening, add_special_tokens=True, verbose=False).input_ids)
        if len(ids) > 1 and ids[-1] == getattr(tokenizer, "eos_token_id", None):
            ids.pop()  # a prompt does not end with EOS
        return ids
    try:
        if not _template(tokenizer):  # such a tokenizer writes special tokens only as ids
            return [*_apply(tokenizer, user, tokenize=True)["input_ids"], *plain_ids(tokenizer, opening)]
        template = tokenizer.get_chat_template()
        stopped = {} if clock or _CLOCK not in template else {"chat_template": _STOPPED_CLOCK + template}
        text = _apply(tokenizer, user, tokenize=False, **stopped)
    except Exception as error:
        raise _unusable(error) from error
    return plain_ids(tokenizer, text + opening)  # the template has written the special tokens


def turn_ids(tokenizer: Any, user: str, opening: str = "") -> list[int]:
    """Token ids [T] of a further turn: what ends an answer in the chat format, the user's next message, and
    the opening words of its answer. Without a chat format, the message stands behind a blank line.

    Raises:
        FarspanError: the chat format cannot have a further turn as text.
    """
    if not has_chat(tokenizer):
        return plain_ids(tokenizer, f"\n\n{user}{opening}")
    roles = (("user", "Hi"), ("assistant", _MARK), ("user", user))
    try:
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in roles],
            add_generation_prompt=True,
            tokenize=False,
        )
    except Exception as error:
        raise _unusable(error) from error
    if _MARK not in text or not _template(tokenizer):
        raise FarspanError(
            "The chat format of this model's tokenizer cannot show where an answer ends; use --no-chat to "
            "run several turns without it."
        )
    return plain_ids(tokenizer, text.partition(_MARK)[2] + opening)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids [T] of the text alone, without special tokens."""
    # verbose=False: callers try lengths beyond the tokenizer's model_max_length, which should not warn.
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def encode_prompt(tokenizer: Any, text: str, *, chat: bool | None = None, clock: bool = True) -> Any:
    """Token ids [1, T] of a prompt; chat=None uses the chat template if the tokenizer has one. clock: whether
    a template may write today's date.

    Raises:
        FarspanError: chat=True without a template; a template that cannot be applied, unless chat is False;
            or a prompt without tokens.
    """
    import torch

    ids = prompt_ids(choose_chat(tokenizer, chat), text, clock=clock)
    if not ids:
        raise FarspanError("The prompt is empty: give at least one word.")
    return torch.tensor([ids])


def followed_by(text: str, question: str) -> str:
    """A prompt of a text and a question about it."""
    return f"{text}\n\n{question}"


def encode_prefix(tokenizer: Any, text: str, *, chat: bool | None = None) -> Any:
    """Token ids [1, T] with which every prompt begins that is ``text`` and a question: those of ``text`` as a
    prompt, without the end of the chat format. Today's date is left out, so that later prompts begin alike.

    Raises:
        FarspanError: as ``encode_prompt``.
    """
    alone, asked = (
        encode_prompt(tokenizer, x, chat=chat, clock=False)[0] for x in (text, followed_by(text, "What?"))
    )
    end = min(len(alone), len(asked))
    differ = (alone[:end] != asked[:end]).nonzero()
    return alone[None, : int(differ[0]) if len(differ) else end]


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
        f"The chat template of this model's tokenizer cannot be applied ({reason.rstrip('.')}): use "
        "--no-chat to run the prompt without it, or correct the template."
    )
