"""Options that several commands share, and reading lists and texts from them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..attention.errors import FarspanError
from . import launch

DEFAULT_MODEL = "smollm2-135m"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Hub id, local folder, GGUF file, or an alias of `farspan models`.",
        show_default=True,
    ),
]
Rope = Annotated[
    str | None,
    typer.Option(
        help='Stretch the positions: "yarn:4", "dynamic:4" (factor), or "yarn:32768" (target length).'
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help='"auto" (as saved; float32 on a CPU that has no bfloat16), "bfloat16", "float16" or "float32".'
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help='"cpu", "cuda", or "auto" (CUDA if there is one; several: spread over them, under a '
        "launcher: one each rank)."
    ),
]
Parallel = Annotated[
    str,
    typer.Option(
        help="Under a launcher (torchrun --nproc-per-node N -m farspan ...), how prompts are spread over its "
        'ranks: "auto", "gather", "ring", "ulysses", "usp" or "pass_q"; "none" runs on rank 0 alone.'
    ),
]
Recipe = Annotated[
    Path | None, typer.Option(help="A saved calibration (see `farspan calibrate`) for methods that need one.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")]


def spread_over(value: str) -> Any:
    """The --parallel option as `farspan.patch` takes it; with "none" the other ranks end here."""
    if value == "none":
        launch.only_rank_0()
        return None
    from ..parallel.mesh import MECHANISMS, ContextParallel

    if value not in MECHANISMS:
        raise FarspanError(f"Unknown --parallel {value!r}; it is none, {', '.join(MECHANISMS)}.")
    if value == "auto":
        return value
    if launch.size() == 1:
        raise FarspanError(
            f"--parallel {value} needs several ranks: start it as torchrun --nproc-per-node N -m farspan ..."
        )
    return ContextParallel(mechanism=value)


def load_model(
    name: str, *, rope: str | None, dtype: str, device: str, parallel: Any = None
) -> tuple[Any, Any]:
    """The model and tokenizer that the shared options ask for; of a rank, on a device of its own."""
    import torch

    from ..runtime.models import load

    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise FarspanError(f"Unknown --dtype {dtype!r}; it is auto, bfloat16, float16 or float32.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise FarspanError(
            f"--device {device} was asked for, but torch sees no CUDA device; use --device cpu."
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise FarspanError(f"Unknown --device {device!r}; it is auto, cpu, cuda or cuda:N.")
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if parallel is not None and launch.size() > 1 and device in ("auto", "cuda") and not on_cpu:
        if launch.local_rank() >= torch.cuda.device_count():
            raise FarspanError(
                f"There are {torch.cuda.device_count()} CUDA devices and more ranks on this machine: start "
                "at most one per device (--nproc-per-node)."
            )
        device = f"cuda:{launch.local_rank()}"
        torch.cuda.set_device(device)
    return load(name, dtype=dtype, device_map=None if on_cpu else device, rope=rope)


def split_list(values: list[str]) -> list[str]:
    """The items of a repeated option, each value of which may hold several, separated by commas or spaces."""
    return [item for value in values for item in re.split(r"[,\s]+", value) if item]


def split_methods(values: list[str]) -> list[str]:
    """Method specs of a repeated option; one value may hold several, separated by ";" (a spec holds
    commas)."""
    specs = [spec.strip() for value in values for spec in re.split(r"[;\n]", value) if spec.strip()]
    if not specs:
        raise FarspanError(
            'No method was given; name at least one, such as --methods dense --methods "window:w=512".'
        )
    return specs


def whole_numbers(values: list[str], option: str) -> list[int]:
    """Positive whole numbers of a repeated option; "4K" is 4096."""
    numbers = []
    for item in split_list(values):
        match = re.fullmatch(r"(\d+)(k?)", item, re.IGNORECASE)
        number = int(match[1]) * (1024 if match[2] else 1) if match else 0
        if number < 1:
            raise FarspanError(f"{option} takes positive whole numbers such as 4096 or 4K; got {item!r}.")
        numbers.append(number)
    if not numbers:
        raise FarspanError(f"{option} was given no number; give at least one, such as {option} 4096.")
    return list(dict.fromkeys(numbers))


def batch_size(value: str) -> int | str:
    """The --batch-size option: "auto" or a positive whole number."""
    if value == "auto":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise FarspanError(f"--batch-size is 'auto' or a positive whole number; got {value!r}.")
    return int(value)


def read_text(path: Path | str) -> str:
    """A UTF-8 text file; "-" is stdin."""
    try:
        if str(path) == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        return Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FarspanError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except OSError as error:
        raise FarspanError(
            f"{path} cannot be read: {error.strerror}; give a text file, or - for stdin."
        ) from None


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text of --prompt or of --prompt-file; of stdin where that is "-" or neither is given."""
    if prompt is not None and file is not None:
        raise FarspanError("Both --prompt and --prompt-file were given; give one.")
    if prompt is not None and prompt != "-":
        text = prompt
    elif prompt is None and file is None and sys.stdin.isatty():
        raise FarspanError("There is no prompt; give --prompt TEXT, --prompt-file FILE, or text on stdin.")
    else:
        text = read_text(file or "-")
    if not text.strip():
        raise FarspanError("The prompt is empty; give at least one word.")
    return text
