"""GGUF files: dequantised once into a folder that transformers loads like any other."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...attention.errors import FarspanError
from .sentences import quiet


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF says about itself: the architecture, how a text is split into words, the number of weights."""

    architecture: str
    pre_tokenizer: str | None
    weights: int

    @property
    def converted(self) -> int:
        """About how many bytes the converted folder takes."""
        return 2 * self.weights + (64 << 20)


def read_header(file: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        FarspanError: the file is no GGUF, or it is damaged.
    """
    from gguf import GGUFReader

    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise FarspanError(
                f"{str(file)!r} is not a GGUF file; give a model's folder, a GGUF file, a hub id or an alias."
            )
    try:
        reader = GGUFReader(file)
        architecture = str(reader.fields["general.architecture"].contents())
        pre = reader.fields.get("tokenizer.ggml.pre")
        return Header(
            architecture=architecture,
            pre_tokenizer=None if pre is None else str(pre.contents()),
            weights=sum(int(tensor.n_elements) for tensor in reader.tensors),
        )
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise FarspanError(f"{str(file)!r} is a damaged GGUF file ({error}); download it again.") from error


def convert(file: Path, header: Header, folder: Path) -> None:
    """Dequantise a GGUF to bfloat16 safetensors in `folder`, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet(always=True):
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        _complete(tokenizer.backend_tokenizer, header.pre_tokenizer)
        if limit := getattr(model.config.get_text_config(), "max_position_embeddings", None):
            tokenizer.model_max_length = int(limit)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # Load tokenizer.json as it stands: the architecture's own tokenizer class would build another one from it.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "TokenizersBackend"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def _complete(backend: Any, pre_tokenizer: str | None) -> None:
    """Add to the tokenizer what transformers' reader leaves out where a GGUF names this way of splitting."""
    from tokenizers import normalizers, pre_tokenizers

    if pre_tokenizer == "smollm":  # each digit alone, then GPT-2's way; the reader knows the second half only
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif pre_tokenizer == "qwen2":
        backend.normalizer = normalizers.NFC()
