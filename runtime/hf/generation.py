"""Generation by a given config: of the model's own generation config, only the settings named here apply.

A checkpoint's generation_config.json may hold any setting of `generate`: a cache class, no cache, beams,
suppressed tokens. Passing a config to `generate` does not switch them off, because transformers takes unset
values from the model's config. So the model's config is replaced while `generate` runs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from ...attention.errors import FarspanError
from .releases import returned_cache, with_cache
from .transformers_private import default_generation_settings

_TOKENS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"})

# Settings that the caller decides: length, sampling, and the form of the result.
_DECIDED = frozenset(
    {
        "do_sample", "temperature", "top_p", "max_length", "max_new_tokens", "return_dict_in_generate",
        "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    }
)  # fmt: skip

_KEPT = _TOKENS | {
    "min_length", "min_new_tokens", "max_time", "stop_strings", "forced_bos_token_id", "forced_eos_token_id",
    "num_beams", "early_stopping", "length_penalty",
    "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "guidance_scale", "watermarking_config", "prompt_lookup_num_tokens", "max_matching_ngram_size",
}  # fmt: skip

_OWN_STORE = "farspan stores keys and values in its own cache"
_REASONS = {
    "use_cache": "without a cache every new token would compute the prompt again",
    "cache_implementation": _OWN_STORE,
    "cache_config": _OWN_STORE,
    "max_cache_len": _OWN_STORE,
    "num_return_sequences": "only one answer is written",
    "token_healing": "it would change the prompt",
    "prefill_chunk_size": "--prefill-chunk cuts the prompt",
}
_UNSUPPORTED = "farspan does not serve it"


def greedy_config(*, max_new_tokens: int, pad: int, eos: Sequence[int]) -> GenerationConfig:
    """A config for greedy decoding of at most `max_new_tokens` tokens. eos: the tokens that end an answer;
    empty: no token ends it."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=list(eos) or None,
        do_sample=False,
        num_beams=1,
        use_cache=True,
    )


def generate_by(model: Any, config: GenerationConfig, **inputs: Any) -> Any:
    """`model.generate(**inputs)` with the settings of `config` alone. Afterwards the model's own generation
    config is in place again.

    Every module that holds a generation config gets a copy of `config`, because a wrapper such as PEFT's
    passes its config on to the model inside it.
    """
    owners = [(m, vars(m)["generation_config"]) for m in model.modules() if "generation_config" in vars(m)]
    try:
        for module, _ in owners:
            module.generation_config = copy.deepcopy(config)
        return model.generate(generation_config=config, **inputs)
    finally:
        for module, own in owners:
            module.generation_config = own


def generation_settings(model: Any) -> dict[str, Any]:
    """The settings of the model's generation config that differ from transformers' defaults, without token
    ids, as JSON-compatible values. `generate_by` does not use them."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return {}
    defaults = default_generation_settings()
    known = vars(GenerationConfig())
    left_out = _TOKENS | {"transformers_version"}
    return {
        name: _plain(value)
        for name, value in config.to_dict().items()
        if name in known
        and name not in left_out
        and not name.startswith("_")  # notes on how the config was made
        and value is not None
        and value != defaults.get(name)
    }


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except TypeError:  # an object, such as a watermark's config
        return str(value)


def kept_config(model: Any, **decided: Any) -> tuple[GenerationConfig, list[str]]:
    """(config, settings left out). The config holds the model's own settings; those `decided` by the caller
    override them.

    A setting that a patched model cannot serve is left out, and listed as "name=value (reason)".
    """
    settings = generation_settings(model)
    own = getattr(model, "generation_config", None)
    tokens = {name: getattr(own, name, None) for name in _TOKENS}
    kept = {name: getattr(own, name) for name in settings if name in _KEPT}
    least, most = kept.get("min_new_tokens"), decided.get("max_new_tokens")
    dropped = {
        name: _REASONS.get(name, _UNSUPPORTED)
        for name in settings
        if name not in _KEPT | _DECIDED and name not in decided
    }
    if least is not None and most is not None and least > most:
        dropped["min_new_tokens"] = f"the answer has at most {most} tokens"
        del kept["min_new_tokens"]
    config = GenerationConfig(use_cache=True, **decided)
    for name, value in (tokens | kept).items():
        setattr(config, name, value)  # the constructor would warn about settings without effect
    return config, [f"{name}={settings[name]!r} ({reason})" for name, reason in dropped.items()]


def servable(settings: Mapping[str, Any]) -> None:
    """Raises FarspanError for a setting of a generation config that a patched model cannot serve."""
    for name in settings:
        if name not in _KEPT | _DECIDED:
            raise FarspanError(f"{name} cannot be set: {_REASONS.get(name, _UNSUPPORTED)}.")


def streams(config: GenerationConfig) -> bool:
    """Whether `generate` with `config` produces final tokens one by one, so that they can be streamed."""
    return config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def fill(model: Any, ids: Any, mask: Any) -> Any:
    """The cache after a prompt ids [B, T], from a plain call without gradients. mask [B, T]: 0 at the padding
    on the left."""
    with torch.no_grad():
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),  # as `generate` counts them
            use_cache=True,
            logits_to_keep=1,
        )
    return returned_cache(output)


@torch.no_grad()
def extend(model: Any, ids: Any, cache: Any, *, start: int) -> None:
    """Feed the tokens from `start` on of one row, ids [1, T], to a cache that holds those before."""
    model(
        input_ids=ids[:, start:],
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(start, ids.shape[1], device=ids.device)[None],
        use_cache=True,
        logits_to_keep=1,
        **with_cache(model, cache),
    )


def answer_by(
    model: Any, config: GenerationConfig, inputs: Mapping[str, Any], tokenizer: Any, streamer: Any = None
) -> Any:
    """Generate by `config`: the new tokens [N] after one prompt. inputs: `input_ids` [1, T], and what
    `generate` takes besides. streamer: only for a config for which `streams` is true.

    Raises FarspanError where transformers refuses one of the model's own settings.
    """
    ids = inputs["input_ids"]
    inputs = {"attention_mask": ids.new_ones(ids.shape), **inputs}
    if config.stop_strings is not None:
        inputs["tokenizer"] = tokenizer
    if streamer is not None:
        inputs["streamer"] = streamer
    try:
        return generate_by(model, config, **inputs)[0, ids.shape[1] :]
    except FarspanError:
        raise
    except (ValueError, IndexError) as error:
        kept = sorted(set(generation_settings(model)) & _KEPT)
        if not kept:
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise FarspanError(
            f"transformers cannot generate by the model's generation config, which sets {', '.join(kept)} "
            f"({reason}); correct its generation_config.json."
        ) from error
