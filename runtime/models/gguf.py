"""GGUF files: converted once to a folder in the format that transformers loads."""

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
    """The header of a GGUF file.

    pre_tokenizer: the name of the rule that splits a text into words, such as "qwen2". add_bos: whether a
    text begins with the BOS token. rope_scaled: whether the rotary positions are stretched. weights: number
    of weights.
    """

    architecture: str
    pre_tokenizer: str | None
    add_bos: bool
    rope_scaled: bool
    weights: int

    @property
    def converted(self) -> int:
        """The approximate number of bytes of the converted folder."""
        return 2 * self.weights + (64 << 20)


def check_gguf(file: Path) -> None:
    """Raise FarspanError for a file that cannot be read or is not a GGUF."""
    try:
        with file.open("rb") as opened:
            magic = opened.read(4)
    except OSError as error:
        raise FarspanError(
            f"Could not read {str(file)!r} ({error.strerror}): give a file that this user may read."
        ) from error
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
    except Exception as error:  # numpy and gguf may raise anything on damaged bytes
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
    except Exception as error:  # transformers' reader may raise anything
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in _DISK_ERRORS:
            raise
        raise FarspanError(
            f"transformers cannot read {what}: {_first_line(error)}. Give the model's published folder or "
            "hub id instead."
        ) from error
    # This class loads tokenizer.json unchanged; the tokenizer class of an architecture may change it.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "TokenizersBackend"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def _read(file: Path, what: str, header: Header) -> tuple[Any, Any]:
    """(model in bfloat16, tokenizer)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with contextlib.ExitStack() as stack:
        # transformers also reads a tokenizer or an adapter in the folder of the file, so the file is linked
        # into a folder of its own.
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        (Path(folder) / file.name).symlink_to(file.resolve())
        # a progress bar that cannot be disabled
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
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
            f"{what} lacks {len(missing)} weights, such as {missing[0]}. Give a file with all weights "
            "(llama-gguf-split --merge joins the files of a split GGUF)."
        )
    config = model.config.get_text_config()
    if header.rope_scaled and _plain_rope(config.rope_parameters):
        raise FarspanError(
            f"{what} has stretched rotary positions, which transformers' reader does not read. Give the "
            "model's published folder or hub id instead."
        )
    _complete(tokenizer, header, what)
    if limit := getattr(config, "max_position_embeddings", None):
        tokenizer.model_max_length = int(limit)
    return model, tokenizer


def _plain_rope(parameters: dict[str, Any] | None) -> bool:
    """Whether no kind of layer has stretched positions. parameters: those of all layers, or a dict for each
    kind of layer."""
    kinds = [kind for kind in (parameters or {}).values() if isinstance(kind, dict)] or [parameters or {}]
    return all(kind.get("rope_type", "default") == "default" for kind in kinds)


def _complete(tokenizer: Any, header: Header, what: str) -> None:
    """Add the parts of a tokenizer that transformers' reader does not read."""
    from tokenizers import normalizers, pre_tokenizers, processors

    backend, name = tokenizer.backend_tokenizer, header.pre_tokenizer
    if name == "smollm":  # single digits, then GPT-2's rule; the reader sets only GPT-2's rule
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif name == "qwen2":
        backend.normalizer = normalizers.NFC()
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and name not in _GPT2_SPLITS:
        warnings.warn(
            f"{what} splits text by the rule {name!r}, which transformers' reader does not know. farspan "
            "splits text as GPT-2 does, so some tokens may differ from those of the published model.",
            stacklevel=2,
        )
    bos = tokenizer.bos_token
    # transformers 5.21 does not add it
    if header.add_bos and bos and tokenizer.bos_token_id not in tokenizer("a")["input_ids"]:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.bos_token_id)],
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
