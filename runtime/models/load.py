"""Load a model and its tokenizer, and check the length of a prompt against the model's positions."""

from __future__ import annotations

import difflib
import logging
import os
import warnings
from pathlib import Path
from typing import Any

from ...attention.errors import FarspanError
from ...attention.ops.processor import bf16_is_slow
from ..rope import SMALLEST_TARGET, can_stretch, stretch
from .aliases import ALIASES
from .fetch import cached, convert_once, fetch, is_converted
from .sentences import check_weights, errors_as_sentences, quiet, sentence_of, unfit_weights_unreported

logger = logging.getLogger("farspan")


def resolve(name_or_path: str | Path) -> Path | str:
    """The name that transformers loads a model by: a folder, or the hub id that was given.

    On first use an alias is fetched, and a GGUF file is converted, into a folder in the cache.

    Raises:
        FarspanError: a path that does not exist, a misspelt alias, a file that is not a GGUF or cannot be
            read, or an alias that cannot be fetched (no network, another checksum, no space, no permission
            to write).
    """
    name = str(name_or_path)
    if name in ALIASES:
        return cached(name) or fetch(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return convert_once(path)
    like_a_path = name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name
    if like_a_path or name.lower().endswith(".gguf") or isinstance(name_or_path, Path):
        raise FarspanError(
            f"There is no folder or file {name!r}: give a model's folder, a GGUF file, a hub id such as "
            f"'organisation/model', or an alias ({', '.join(ALIASES)})."
        )
    if nearest := difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.75):
        raise FarspanError(f"There is no model {name!r}; did you mean the alias {nearest[0]!r}?")
    return name


def load(
    name_or_path: str | Path, *, dtype: Any = "auto", device_map: Any = None, rope: str | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: an alias (`ALIASES`), a local folder, a local GGUF file, or a hub id.
        dtype: a torch dtype, its name such as "float32", or "auto": the saved dtype, but float32 instead of
            bfloat16 on a CPU that has no instructions for bfloat16.
        device_map: see transformers; None loads on the CPU.
        rope: how to stretch the positions, such as "yarn:4" or "dynamic:32768" (`runtime.rope.stretch`).

    Returns:
        (model in eval mode, tokenizer that pads on the left and always has a pad token).

    Raises:
        FarspanError: the model cannot be found, reached, read, or stretched.
    """
    target = resolve(name_or_path)
    with errors_as_sentences(str(name_or_path), target), quiet():
        from transformers import AutoModelForCausalLM

        from ..hf.converted import class_of_config, read_config

        config = read_config(target)
        own = class_of_config(config)
        if rope is not None:
            stretch(config, rope)
        if dtype == "auto" and device_map is None and _saved_as_bf16(config) and bf16_is_slow():
            dtype = "float32"
            logger.debug("Loading %s in float32: this CPU has no instructions for bfloat16.", name_or_path)
        tokenizer = _load_tokenizer(target, {} if own is None else {"config": config})
        with unfit_weights_unreported():
            model, found = (own or AutoModelForCausalLM).from_pretrained(
                target,
                config=config,
                dtype=dtype,
                device_map=device_map,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_weights refuses them by name
            )
        check_weights(str(name_or_path), found)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if (limit := positions(model)) is not None:
        tokenizer.model_max_length = limit
    return model.eval(), tokenizer


def _load_tokenizer(target: Path | str, how: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer would replace the GGUF's rule for splitting text by that of the architecture.
    kind: Any = PreTrainedTokenizerFast if is_converted(target) else AutoTokenizer
    try:
        return kind.from_pretrained(target, **how)
    except Exception as error:
        if not isinstance(target, Path):
            raise
        raise FarspanError(
            f"Could not load a causal language model from {target}: its tokenizer cannot be read "
            f"({sentence_of(error)}). Save the model's tokenizer there (tokenizer.save_pretrained), or copy "
            "the tokenizer's files, such as tokenizer.json."
        ) from error


def _saved_as_bf16(config: Any) -> bool:
    return str(getattr(config, "dtype", None)).removeprefix("torch.") == "bfloat16"


def positions(model: Any) -> int | None:
    """The number of positions of `model`, after stretching; None where its configuration sets no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def check_length(model: Any, tokens: int, *, what: str = "The prompt", strict: bool = True) -> None:
    """Raise FarspanError, or with strict=False warn, for a text of more tokens than the model has positions.

    Raises:
        FarspanError: `tokens` is more than `positions(model)`. With strict=False this is raised only for a
            model with a learned table of positions, which has no entry for later tokens.
    """
    limit = positions(model)
    if limit is None or tokens <= limit:
        return
    name = getattr(model.config, "name_or_path", "") or "the model"
    name = Path(name).name if os.path.isabs(name) else name
    final = _has_position_table(model, limit)
    sentence = (
        f"{what} has {tokens} tokens, but {name} has {limit} positions and "
        f"{'cannot read' if final else 'does not understand'} later tokens: "
        f"{_stretching(model.config, tokens, limit)}shorten the text."
    )
    if strict or final:
        raise FarspanError(sentence)
    warnings.warn(sentence, stacklevel=2)


def _has_position_table(model: Any, limit: int) -> bool:
    """Whether the model has a learned table of positions (GPT-2, OPT). Such a table may have a few entries
    more than there are positions."""
    import torch

    words = model.get_input_embeddings()
    tables = (m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not words)
    return any(0 <= table.num_embeddings - limit < 8 for table in tables)


def _stretching(config: Any, tokens: int, limit: int) -> str:
    """Advice to stretch `limit` positions to `tokens` by a whole factor; "" where `stretch` cannot do it."""
    if not can_stretch(config):
        return ""
    factor = -(-tokens // limit)
    return f"stretch them with rope='yarn:{factor if factor < SMALLEST_TARGET else factor * limit}', or "


def text_streamer(tokenizer: Any) -> Any:
    """A streamer for `model.generate(streamer=...)` that writes each part of the answer to stdout at once."""
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
