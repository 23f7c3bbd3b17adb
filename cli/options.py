"""Options of commands as dataclasses, those that several commands share, and how their values are read.

A command is a function of one frozen dataclass. Each field is an option: its annotation carries typer's
help. A field that is a dataclass itself is a group of options that several commands share.

    @dataclass(frozen=True, kw_only=True)
    class Tune:
        model: options.Model = options.DEFAULT_MODEL
        on: options.Place

    @app.command()
    @options.command
    def tune(given: Tune) -> None: ...
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from ..attention.errors import FarspanError
from . import amounts, launch

T = TypeVar("T")

DEFAULT_MODEL = "smollm2-135m"

DTYPES = {
    "auto": ("auto",),
    "bfloat16": ("bfloat16", "bf16"),
    "float16": ("float16", "fp16", "half"),
    "float32": ("float32", "fp32", "float"),
}


def command(function: Callable[[T], None]) -> Callable[..., None]:
    """The function as a typer command: its one parameter, a dataclass, becomes an option for each field.

    typer does not take dataclasses, so the result has a signature of its own, built from the fields in their
    order; the fields of a group stand in the group's place. The function is called with the one value.
    """
    [(_, kind)] = [item for item in get_type_hints(function).items() if item[0] != "return"]
    parameters = list(_parameters(kind))

    @functools.wraps(function)
    def run(**values: Any) -> None:
        function(_gathered(kind, values))

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters(kind: type[Any]) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _parameters(hints[field.name])
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING else default,
            annotation=hints[field.name],
        )


def _gathered(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass of the values of its fields and of its groups' fields."""
    hints = get_type_hints(kind)
    return kind(
        **{
            field.name: _gathered(hints[field.name], values)
            if dataclasses.is_dataclass(hints[field.name])
            else values[field.name]
            for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        }
    )


def tokens(help: str) -> Any:
    """An option that takes a number of tokens, such as 4096, 128K or 1M."""
    return typer.Option(help=help, metavar="TOKENS", parser=str, callback=_whole)


def count(help: str) -> Any:
    """An option that takes a positive whole number."""
    return typer.Option(help=help, metavar="NUMBER", parser=str, callback=_whole)


def _whole(param: typer.CallbackParam, value: str | None) -> int | None:
    return None if value is None else amounts.whole(value, param.opts[0])


def memory(help: str) -> Any:
    """An option that takes bytes, such as 80G."""
    return typer.Option(help=help, metavar="BYTES", parser=str, callback=_memory)


def _memory(param: typer.CallbackParam, value: str | None) -> int | None:
    return None if value is None else amounts.size(value, param.opts[0])


def crossover(help: str) -> Any:
    """An option that takes "auto" or a number of tokens."""
    return typer.Option(help=help, metavar="auto|TOKENS", parser=str, callback=_crossover)


def _crossover(param: typer.CallbackParam, value: str | None) -> int | str | None:
    return value if value in (None, "auto") else amounts.whole(value, f'{param.opts[0]}, if not "auto",')


def dtype(help: str) -> Any:
    """An option that takes "auto" or a type of tensors, by one of its names."""
    return typer.Option(help=help, callback=_dtype)


def _dtype(param: typer.CallbackParam, value: str) -> str:
    for name, spellings in DTYPES.items():
        if value.lower() in spellings:
            return name
    known = ", ".join(" or ".join(spellings[:2]) for spellings in DTYPES.values())
    raise FarspanError(f"Unknown {param.opts[0]} {value!r}; it is one of {known}.")


def _rope(value: str | None) -> str | None:
    """The value of --rope with its number written out. A wrong one is refused here, before a model is
    read."""
    if value is None:
        return None
    from ..runtime.rope import parse_rope

    kind, colon, number = value.partition(":")
    if re.fullmatch(r"\s*[0-9.]+[kmg]\s*", number, re.IGNORECASE):
        number = str(amounts.whole(number, f"--rope {kind}:"))
    parse_rope(kind + colon + number)
    return kind + colon + number


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
        help='Stretch the positions: "yarn:4", "dynamic:4" (factor), or "yarn:32K" (target length).',
        callback=_rope,
    ),
]
Dtype = Annotated[
    str,
    dtype('"auto" (as saved; float32 on a CPU that has no bfloat16), "bf16", "fp16" or "fp32".'),
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
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Use the chat template [default: if the model has one]."),
]
Recipe = Annotated[
    Path | None, typer.Option(help="A saved calibration (see `farspan calibrate`) for methods that need one.")
]
Text = Annotated[
    list[str],
    typer.Option(
        help='A text file or folder of .txt files, repeatable; "sotu"; or "datasets:NAME", '
        '"datasets:NAME:CONFIG" for the column "text" of a data set.'
    ),
]
Windows = Annotated[
    int | None, count("Windows of the text to use; more steps use them again [default: all].")
]
HeldOut = Annotated[int, count("Windows that are measured and not trained on.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Where a prompt comes from."""

    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help='The prompt itself; "-" reads stdin.')
    ] = None
    prompt_file: Annotated[Path | None, typer.Option(help='A UTF-8 text file; "-" reads stdin.')] = None

    def read(self) -> str:
        """The text of --prompt or of --prompt-file; of stdin where that is "-" or neither is given."""
        if self.prompt is not None and self.prompt_file is not None:
            raise FarspanError("Both --prompt and --prompt-file were given; give one.")
        if self.prompt is not None and self.prompt != "-":
            text = self.prompt
        elif self.prompt is None and self.prompt_file is None and sys.stdin.isatty():
            raise FarspanError(
                "There is no prompt; give --prompt TEXT, --prompt-file FILE, or text on stdin."
            )
        else:
            text = read_text(self.prompt_file or "-")
        if not text.strip():
            raise FarspanError("The prompt is empty; give at least one word.")
        return text


@dataclass(frozen=True, kw_only=True)
class Place:
    """In which dtype, and on which device, a model is loaded."""

    dtype: Dtype = "auto"
    device: Device = "auto"

    def load(self, model: str, rope: str | None = None, ranks: Any = None) -> tuple[Any, Any]:
        """The model and its tokenizer. ranks: what `Ranks.spread` gave."""
        return load_model(model, rope=rope, dtype=self.dtype, device=self.device, parallel=ranks)


@dataclass(frozen=True, kw_only=True)
class Ranks(Place):
    """The same, for a command that a launcher's ranks run together."""

    parallel: Parallel = "auto"

    def spread(self) -> Any:
        """The value of --parallel as `farspan.patch` takes it. With "none", all ranks but rank 0 end here."""
        return spread_over(self.parallel)


def spread_over(value: str) -> Any:
    """The value of --parallel as `farspan.patch` takes it. With "none", all ranks but rank 0 end here."""
    if value == "none":
        launch.only_rank_0()
        return None
    from ..parallel.group.config import MECHANISMS, ContextParallel

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
    """The model and its tokenizer. Each rank of a launcher loads the model on its own device."""
    import torch

    from ..runtime.models import load

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
    """The items of a repeated option. One value may hold several, separated by commas or spaces."""
    return [item for value in values for item in re.split(r"[,\s]+", value) if item]


def split_methods(values: list[str], *, shortens: bool = False) -> list[str]:
    """The method specs of a repeated option. One value may hold several, separated by ";": specs have commas.

    shortens: whether a spec may ask for shorter prompts ("compress:keep=0.3 + quest").
    Raises FarspanError where there is none, where one cannot be read, and for two with a comma between them.
    """
    specs = [spec.strip() for value in values for spec in re.split(r"[;\n]", value) if spec.strip()]
    if not specs:
        raise FarspanError(
            'No method was given; name at least one, such as --methods dense --methods "window:w=512".'
        )
    for spec in specs:
        if (parts := _several(spec, ",")) is not None:
            raise FarspanError(
                f'--methods separates methods by ";": write "{"; ".join(parts)}"; got {spec!r}.'
            )
        _resolve(spec, shortens)
    return specs


def one_method(spec: str) -> str:
    """The spec of an option that takes one method. Raises FarspanError if it cannot be read or is several."""
    if _several(spec, ",") or _several(spec, ";"):
        raise FarspanError(
            f'--method takes one method, or "A + B" for A in prefill and B in decode; got {spec!r}.'
        )
    _resolve(spec)
    return spec


def _resolve(spec: str, shortens: bool = False) -> None:
    from ..runtime.compress.spec import method_of
    from ..runtime.specs import resolve

    resolve(method_of(spec, shortens=shortens))


def _several(spec: str, separator: str) -> list[str] | None:
    """The methods in ``spec``, if it is a list of several with ``separator`` between them; None if it is
    one."""
    from ..attention.spec import methods

    parts: list[str] = []
    for piece in re.split(rf"{separator}(?![^()]*\))", spec):
        name = re.match(r"\s*(\w+)\s*(:|(?![\w=]))", piece)  # a name before "=" is a parameter
        if not parts or (name and (name[2] or name[1] in methods())):
            parts.append(piece.strip())
        else:
            parts[-1] += separator + piece
    return parts if len(parts) > 1 else None


def whole_numbers(values: list[str], option: str) -> list[int]:
    """The numbers of a repeated option, without repeats; "4K" is 4096."""
    numbers = [amounts.whole(item, option) for item in split_list(values)]
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
    """The text of a UTF-8 file, or of stdin for "-": without a byte order mark, and with lines that end in
    "\\n". Raises FarspanError if it cannot be read."""
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).expanduser().read_bytes()
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        name = "stdin" if str(path) == "-" else path
        raise FarspanError(
            f"{name} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise FarspanError(
            f"{path} cannot be read: {error.strerror}; give a text file, or - for stdin."
        ) from None


def read_prose(sources: list[str]) -> str:
    """All text of the files and folders named, as one string; "sotu" names the speeches of that package."""
    from ..evals.text import load_prose

    return "\n\n".join(load_prose(source).whole for source in sources)
