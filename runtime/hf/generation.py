"""Generating by a config of our own: nothing of the model's generation config counts that is not named here.

A checkpoint's generation_config.json may hold any setting of `generate`: a cache of its own, no cache at all,
beams, suppressed tokens. A config that is passed to `generate` does not keep them out, because transformers
fills what it leaves unset from the model's. So the model's config is replaced while `generate` runs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig
from transformers.generation import GenerationMode

from ...attention.errors import FarspanError
from .transformers_private import default_generation_settings

_TOKENS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"})

# What the caller decides itself: how long and whether to sample, and in which form the answer comes back.
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

_OWN_STORE = "farspan stores keys and values itself"
_REASONS = {
    "use_cache": "without stored keys every token would read the prompt anew",
    "cache_implementation": _OWN_STORE,
    "cache_config": _OWN_STORE,
    "max_cache_len": _OWN_STORE,
    "num_return_sequences": "one answer is written",
    "token_healing": "it would change the prompt",
    "prefill_chunk_size": "--prefill-chunk cuts the prompt",
}
_UNSUPPORTED = "farspan does not serve it"


def greedy_config(*, max_new_tokens: int, pad: int, eos: Sequence[int]) -> GenerationConfig:
    """Greedy decoding of at most `max_new_tokens` tokens, ended by the tokens `eos` alone (none: by
    nothing)."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=list(eos) or None,
        do_sample=False,
        num_beams=1,
        use_cache=True,
    )


def generate_by(model: Any, config: GenerationConfig, **inputs: Any) -> Any:
    """`model.generate(**inputs)` by `config` alone. The model's own generation config is back in place
    afterwards.

    Every module that holds a generation config gets a copy of `config`: a wrapper such as PEFT's hands its
    own on to the model inside it.
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
    """The settings of the model's generation config that differ from transformers' defaults, token ids left
    out: what `generate_by` sets aside. JSON-able."""
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
        and not name.startswith("_")  # how the config was made
        and value is not None
        and value != defaults.get(name)
    }


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except TypeError:  # an object, such as a watermark's config
        return str(value)


def kept_config(model: Any, **decided: Any) -> tuple[GenerationConfig, list[str]]:
    """(a config of the model's own settings under those that the caller has `decided`, what it leaves out).

    Left out are the settings that a patched model cannot serve, each as "name=value (reason)".
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
        setattr(config, name, value)  # given to the class, those without effect would be warned about
    return config, [f"{name}={settings[name]!r} ({reason})" for name, reason in dropped.items()]


def streams(config: GenerationConfig) -> bool:
    """Whether `generate` by `config` settles one token after another, so that they can be shown as they
    come."""
    return config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def answer_by(model: Any, config: GenerationConfig, ids: Any, tokenizer: Any, streamer: Any = None) -> Any:
    """The new tokens [N] after one prompt `ids` [1, T]. streamer: for a config that `streams`.

    Raises FarspanError where transformers refuses one of the model's own settings.
    """
    inputs: dict[str, Any] = {"attention_mask": ids.new_ones(ids.shape)}
    if config.stop_strings is not None:
        inputs["tokenizer"] = tokenizer
    if streamer is not None:
        inputs["streamer"] = streamer
    try:
        return generate_by(model, config, input_ids=ids, **inputs)[0, ids.shape[1] :]
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
