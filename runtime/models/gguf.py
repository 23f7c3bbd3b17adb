"""GGUF files: dequantised once into a folder that transformers loads like any other."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...attention.errors import FarspanError
from .sentences import quiet

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_GPT2_SPLITS = (None, "default", "gpt-2", "gpt2")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF says about itself.

    pre_tokenizer names the way a text is split into words, such as "qwen2". add_bos says that a text begins
    with the BOS token, rope_scaled that the rotary positions are stretched.
    """

    architecture: str
    pre_tokenizer: str | None
    add_bos: bool
    rope_scaled: bool
    weights: int

    @property
    def converted(self) -> int:
        """About how many bytes the converted folder takes."""
        return 2 * self.weights + (64 << 20)


def check_gguf(file: Path) -> None:
    """Raises FarspanError for a file that cannot be read or is no GGUF."""
    try:
        with file.open("rb") as opened:
            magic = opened.read(4)
    except OSError as error:
        raise FarspanError(f"Could not read {str(file)!r}: {error.strerror}.") from error
    if magic != b"GGUF":
        raise FarspanError(
            f"{str(file)!r} is not a GGUF file; give a GGUF file, a model's folder, a hub id or an alias."
        )


def read_header(file: Path) -> Header:
    """The header of a GGUF file. Raises FarspanError for a damaged one."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)

        def value(key: str) -> Any:
            field = reader.fields.get(key)
            return None if field is None else field.contents()

        architecture = reader.fields["general.architecture"].contents()
        add_bos = value("tokenizer.ggml.add_bos_token")
        if add_bos is None:  # llama.cpp's rule for older files
            add_bos = value("tokenizer.ggml.model") == "llama"
        scaled = value(f"{architecture}.rope.scaling.type") not in (None, "", "none")
        return Header(
            architecture=architecture,
            pre_tokenizer=value("tokenizer.ggml.pre"),
            add_bos=add_bos,
            rope_scaled=scaled or any(tensor.name.startswith("rope_") for tensor in reader.tensors),
            weights=sum(int(tensor.n_elements) for tensor in reader.tensors),
        )
    except Exception as error:  # whatever numpy and gguf meet in bytes that mean something else
        raise FarspanError(
            f"{str(file)!r} is a damaged GGUF file ({_first_line(error)}); download it again."
        ) from error


def convert(file: Path, header: Header, folder: Path) -> None:
    """Dequantise a GGUF to bfloat16 safetensors in `folder`, with its tokenizer and chat template.

    Raises:
        FarspanError: transformers cannot read the file, or would leave out a part of it.
    """
    what = f"{str(file)!r} (a GGUF of architecture {header.architecture!r})"
    try:
        with quiet(always=True):
            model, tokenizer = _read(file, what, header)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except FarspanError:
        raise
    except Exception as error:  # transformers' reader raises whatever it meets
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in _DISK_ERRORS:
            raise
        raise FarspanError(
            f"transformers cannot read {what}: {_first_line(error)}. Give the model's published folder or "
            "hub id instead."
        ) from error
    # The class that takes tokenizer.json as it stands, where an architecture's own would change it.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "TokenizersBackend"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def _read(file: Path, what: str, header: Header) -> tuple[Any, Any]:
    """(model in bfloat16, tokenizer)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with contextlib.ExitStack() as stack:
        # transformers also reads a tokenizer or an adapter that lies beside the file: here it lies alone.
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        (Path(folder) / file.name).symlink_to(file.resolve())
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # a progress bar without a switch
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
    if missing := sorted(loading["missing_keys"]):
        raise FarspanError(
            f"{what} lacks {len(missing)} weights, {missing[0]} among them. Give a file with all of them "
            "(llama-gguf-split --merge joins a split one)."
        )
    config = model.config.get_text_config()
    if header.rope_scaled and _plain_rope(config.rope_parameters):
        raise FarspanError(
            f"{what} stretches its rotary positions, which transformers' reader leaves out. Give the model's "
            "published folder or hub id instead."
        )
    _complete(tokenizer, header, what)
    if limit := getattr(config, "max_position_embeddings", None):
        tokenizer.model_max_length = int(limit)
    return model, tokenizer


def _plain_rope(parameters: dict[str, Any] | None) -> bool:
    """Whether no kind of layer has stretched positions; parameters are one kind's, or one dict a kind."""
    kinds = [kind for kind in (parameters or {}).values() if isinstance(kind, dict)] or [parameters or {}]
    return all(kind.get("rope_type", "default") == "default" for kind in kinds)


def _complete(tokenizer: Any, header: Header, what: str) -> None:
    """Add what transformers' readers leave out of a tokenizer."""
    from tokenizers import normalizers, pre_tokenizers, processors

    backend, name = tokenizer.backend_tokenizer, header.pre_tokenizer
    if name == "smollm":  # each digit alone, then GPT-2's way; the reader knows the second half only
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif name == "qwen2":
        backend.normalizer = normalizers.NFC()
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and name not in _GPT2_SPLITS:
        warnings.warn(
            f"{what} splits text in the way of {name!r}, which transformers' reader does not know; farspan "
            "splits it as GPT-2 does, so some tokens may differ from the published model's.",
            stacklevel=2,
        )
    bos = tokenizer.bos_token
    if header.add_bos and bos and tokenizer.bos_token_id not in tokenizer("a")["input_ids"]:  # 5.21's reader
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.bos_token_id)],
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
