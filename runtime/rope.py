"""Stretch a model's positions before it is loaded: YaRN and NTK-scaled rotary embeddings.

Only the configuration is changed, in the form that transformers reads (`rope_parameters`), so a stretched
model can be saved and loaded again. The factor is fixed before the first token. transformers' own
`rope_type="dynamic"` changes the frequencies while the sequence grows, so that cached keys, and the chunks of
one prompt, are rotated by different frequencies.
"""

from __future__ import annotations

import copy
from typing import Any

from ..attention.errors import FarspanError, Unsupported

KINDS = ("yarn", "dynamic")
# A number below this is a factor; other numbers are a target length in tokens. No factor is as large as 256.
SMALLEST_TARGET = 256


def parse_rope(rope: str) -> tuple[str, float]:
    """Split "yarn:4" or "dynamic:32768" into kind and number: a factor below 256, a target length otherwise.

    Raises:
        FarspanError: the kind is unknown, or the number is missing or not above 1.
    """
    kind, _, number = rope.partition(":")
    kind = kind.strip().lower()
    usage = (
        'write "yarn:4" or "dynamic:4" for four times the model\'s positions, '
        'or a target length such as "yarn:32768"'
    )
    if kind not in KINDS:
        raise FarspanError(f"Unknown rope stretching {rope!r}; its kinds are {' and '.join(KINDS)}: {usage}.")
    try:
        value = float(number)
    except ValueError:
        raise FarspanError(f"The rope stretching {rope!r} has no number after the colon: {usage}.") from None
    if not 1.0 < value < 1e9:
        raise FarspanError(f"The number of the rope stretching {rope!r} must be above 1: {usage}.")
    return kind, value


def stretch(config: Any, rope: str) -> None:
    """Change a transformers configuration (for a multimodal model, its text config) to have more positions.

    With M the number of positions and s the factor (target length / M), `max_position_embeddings` becomes s·M
    and

    - "yarn": `rope_type="yarn"` with factor s over M positions, theta kept (YaRN, arXiv 2309.00071).
    - "dynamic": NTK-aware scaling with s fixed at the target length, theta · s^(d / (d − 2)) for d rotated
      dimensions (the same paper, section 3.1; transformers' "dynamic" at sequence length s·M, factor 1).

    Where each layer type has its own rotary embedding (Gemma 3), only that of full attention is stretched,
    because distances within a sliding window do not grow.

    Raises:
        FarspanError: `rope` cannot be read, or its target is not above the positions of the model.
        Unsupported: the model has no rotary embedding, or one that is stretched already.
    """
    kind, value = parse_rope(rope)
    text = config.get_text_config()
    name = getattr(config, "name_or_path", "") or getattr(config, "model_type", "this model")
    refusal = f"Cannot stretch the positions of {name} by rope={rope!r}"
    original = getattr(text, "max_position_embeddings", None)
    parameters = getattr(text, "rope_parameters", None)
    if not original or not parameters:
        raise Unsupported(refusal, ["it has no rotary position embedding"])
    nested = any(isinstance(entry, dict) for entry in parameters.values())
    entry = parameters.get("full_attention") if nested else parameters
    if not entry:
        raise Unsupported(refusal, ["it has no rotary embedding for full attention"])
    present = entry.get("rope_type", "default")
    if present != "default":
        reason = f"they are already stretched to {original} by {present!r} scaling, so leave rope out"
        raise Unsupported(refusal, [reason])
    target = round(value) if value >= SMALLEST_TARGET else round(value * original)
    if target <= original:
        raise FarspanError(
            f"rope={rope!r} means {target} positions, but {name} already has {original}: "
            "give a larger number, or leave rope out."
        )
    factor = target / original
    stretched = dict(entry)
    if kind == "yarn":
        stretched |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    else:
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        d = int(head_dim * stretched.get("partial_rotary_factor", 1.0))
        stretched["rope_theta"] = stretched["rope_theta"] * factor ** (d / (d - 2))
    text.rope_parameters = {**parameters, "full_attention": stretched} if nested else stretched
    text.max_position_embeddings = target


def can_stretch(config: Any) -> bool:
    """Whether ``stretch`` can give this config more positions. The config is not changed."""
    try:
        stretch(copy.deepcopy(config), "yarn:2")
    except FarspanError:
        return False
    return True
