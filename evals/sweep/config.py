"""The YAML file of a sweep: grids of models × storages × methods × budgets × lengths × tasks.

    out: sweep-out                       # the folders of the evaluations stand in it
    stop: {prompts: 8, dense_below: 2, loss_above: 30}
    grids:
      - suite: ruler                     # or needle, retrieval, turns, fidelity, ppl, speed
        models: [smollm2-135m]
        methods: [dense, "quest:k={k}"]
        budgets: {k: [256, 512]}         # every value in place of {k}
        lengths: [2K, 4K]
        tasks: [niah_single_2, vt]
        samples: 20
        storages: [device, int8]         # of the cache, as --storage; left out: device
        folder: "ruler-{model}-{storage}"

A grid has the options of `farspan eval SUITE`: needle has depths, fidelity has prompts in place of lengths.
Grids are worked through in their order. Two grids may share a folder, such as one with few samples that comes
first; what is there is not done again.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...attention.errors import FarspanError
from ..fidelity import read_prompts
from ..suites import SUITES, options_of, suite_of
from ..task import Suite
from .stops import Stops

DTYPES = ("auto", "bfloat16", "float16", "float32")
_GRID = {
    "suite",
    "rope",
    "chat",
    "models",
    "storages",
    "methods",
    "budgets",
    "dtype",
    "batch_size",
    "recipe",
    "folder",
}
_ASKED = {option for suite in SUITES for option in options_of(suite)} - _GRID
_KINDS: dict[str, type | tuple[type, ...]] = {
    "suite": str,
    "models": list,
    "storages": list,
    "methods": list,
    "budgets": dict,
    "lengths": list,
    "tasks": list,
    "depths": list,
    "samples": int,
    "seed": int,
    "text": str,
    "qa_data": list,
    "compat": bool,
    "prompts": list,
    "turns": int,
    "new_tokens": int,
    "repeats": int,
    "sliding": bool,
    "needle": bool,
    "rope": str,
    "chat": bool,
    "dtype": str,
    "batch_size": (int, str),
    "recipe": str,
    "folder": str,
}
_TEXTS = {"models", "storages", "methods", "tasks", "prompts", "qa_data"}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One model and one storage of one grid: its task, under which methods, into which folder."""

    model: str
    methods: list[str]
    task: Suite
    folder: str
    rope: str | None = None
    chat: bool | None = None
    dtype: str = "auto"
    batch_size: int | str = "auto"
    recipe: str | None = None
    storage: str = "device"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A whole file. out: the folder of the evaluations' folders."""

    out: Path
    grids: list[Grid]
    stops: Stops | None = None


def read(path: Path, out: Path | None = None) -> Sweep:
    """The sweep of a YAML file. out: in place of the file's own.

    Raises FarspanError, with the file's name, for a file that cannot be read, an unknown or missing field, a
    value of the wrong kind, a method that does not exist, and samples that cannot be drawn.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FarspanError(f"{path} cannot be read ({error}); give a YAML file.") from None
    except yaml.YAMLError as error:
        raise FarspanError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    try:
        return _sweep(data, out)
    except FarspanError as error:
        raise FarspanError(f"{path}: {error}") from None


def _sweep(data: Any, out: Path | None) -> Sweep:
    fields = _fields(data, {"out", "stop", "grids"}, "the file")
    grids = fields.get("grids")
    if not isinstance(grids, list) or not grids:
        raise FarspanError("grids is missing; give a list with at least one grid.")
    folder = out or fields.get("out")
    if not isinstance(folder, str | Path):
        raise FarspanError("out is missing; name the folder of the results, there or with --out.")
    stops = None if fields.get("stop") is None else Stops.read(_fields(fields["stop"], Stops.FIELDS, "stop"))
    made = [one for number, grid in enumerate(grids, 1) for one in _grids(grid, f"grid {number}")]
    return Sweep(out=Path(folder), grids=made, stops=stops)


def _grids(data: Any, where: str) -> list[Grid]:
    """One grid for each of its models under each of its storages."""
    fields = _fields(data, _GRID | _ASKED, where)
    for name, value in fields.items():
        kind = _KINDS[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = {
                list: "a list",
                dict: "an object",
                str: "a text",
                int: "a whole number",
                bool: "true or false",
            }
            named = (
                wanted.get(kind, "a whole number or auto")
                if isinstance(kind, type)
                else "a whole number or auto"
            )
            raise FarspanError(f"{name} of {where} is {value!r}; it must be {named}.")
        if name in _TEXTS and not all(isinstance(item, str) for item in value):
            raise FarspanError(f"{name} of {where} is {value!r}; it must be a list of texts.")
    own = options_of(fields["suite"]) if fields.get("suite") in SUITES else {}
    for name in ("suite", "models", "methods", *(name for name in ("lengths", "prompts") if name in own)):
        if not fields.get(name):
            raise FarspanError(f"{name} of {where} is missing; give it.")
    if fields.get("dtype", "auto") not in DTYPES:
        raise FarspanError(f"dtype of {where} is {fields['dtype']!r}; it is one of {', '.join(DTYPES)}.")
    if not own:
        raise FarspanError(f"suite of {where} is {fields['suite']!r}; it is one of {', '.join(SUITES)}.")
    asked = {name: value for name, value in fields.items() if name in _ASKED or name in own}
    if "lengths" in asked:
        asked["lengths"] = [tokens(value, where) for value in asked["lengths"]]
    if "prompts" in asked:
        asked["prompts"] = read_prompts(asked["prompts"])
    task = suite_of(fields["suite"], **asked)
    if "chat" in fields and not task.chats:
        raise FarspanError(f"chat of {where} was given, but these prompts have no chat format; leave it out.")
    from ..run import check_batch_size

    check_batch_size(fields.get("batch_size", "auto"))
    methods = _methods(fields, where)
    storages = _storages(fields, where)
    named = fields.get("folder", f"{task.suite}-{{model}}" + ("-{storage}" if "storages" in fields else ""))
    if not named or set("{}") & set(named.replace("{model}", "").replace("{storage}", "")):
        raise FarspanError(
            f"folder of {where} is {named!r}; give a name, with no {{}} but {{model}} and {{storage}}."
        )
    for one, several in (("model", fields["models"]), ("storage", storages)):
        if len(several) > 1 and f"{{{one}}}" not in named:
            raise FarspanError(f"folder of {where} is one for several {one}s; put {{{one}}} into it.")
    others = ("dtype", "batch_size", "recipe", "rope", "chat")
    rest = {name: fields[name] for name in others if name in fields}
    return [
        Grid(
            model=model,
            methods=methods,
            task=task,
            folder=named.replace("{model}", _slug(Path(model).name)).replace("{storage}", _slug(storage)),
            storage=storage,
            **rest,
        )
        for model in fields["models"]
        for storage in storages
    ]


def _storages(fields: Mapping[str, Any], where: str) -> list[str]:
    """The storages of a grid."""
    from ...runtime.store.storage import parse_storage

    given = list(dict.fromkeys(fields.get("storages", ["device"])))
    if not given:
        raise FarspanError(f"storages of {where} is empty; name one, such as int8, or leave it out.")
    for storage in given:
        parse_storage(storage)
    return given


def _methods(fields: Mapping[str, Any], where: str) -> list[str]:
    """The methods with every budget in the place of its name."""
    from ...runtime.compress.spec import method_of
    from ...runtime.specs import resolve

    budgets = fields.get("budgets", {})
    out: list[str] = []
    for spec in fields["methods"]:
        names = list(dict.fromkeys(re.findall(r"\{(\w+)\}", spec)))
        for name in names:
            if not isinstance(budgets.get(name), list) or not budgets[name]:
                raise FarspanError(f"budgets of {where} has no list {name}, which the method {spec!r} needs.")
        for values in itertools.product(*(budgets[name] for name in names)):
            filled = spec
            for name, value in zip(names, values, strict=True):
                filled = filled.replace(f"{{{name}}}", str(value))
            resolve(method_of(filled, shortens=SUITES[fields["suite"]].shortens))
            out.append(" ".join(filled.split()))
    return list(dict.fromkeys(out))


def tokens(value: Any, where: str) -> int:
    """A length: 4096, or "4K"."""
    match = re.fullmatch(r"(\d+)([KM]?)", str(value).strip().upper())
    number = int(match[1]) * {"": 1, "K": 1024, "M": 1024**2}[match[2]] if match else 0
    if number < 1 or isinstance(value, bool):
        raise FarspanError(
            f"lengths of {where} has {value!r}; a length is a number of tokens such as 4096 or 4K."
        )
    return number


def _fields(data: Any, known: set[str] | frozenset[str], where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise FarspanError(
            f"{where} is {data!r}; it must be an object with fields such as {sorted(known)[0]}."
        )
    for name in data:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else f"; there are {', '.join(sorted(known))}"
            raise FarspanError(f"{where} has no field {name!r}{hint}.")
    return data


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name) or "model"
