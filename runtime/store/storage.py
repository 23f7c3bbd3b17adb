"""How a layer's cache keeps keys and values: in which format, and in which memory."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass

from ...attention.errors import SpecError
from ...attention.kv import KV
from ...attention.spec import find, parse_parameters, split_spec
from ..layer_numbers import by_layer
from .disk import Disk
from .host import Host
from .memory import Memory


@dataclass(frozen=True, kw_only=True)
class Storage:
    """The format and the memory of a store. The default is plain numbers on the device."""

    format: type[KV] = KV
    memory: Memory = dataclasses.field(default_factory=Memory)
    spec: str = "device"  # as users write it

    def __str__(self) -> str:
        return self.spec


DEVICE = Storage()
_FORMATS: dict[str, type[KV]] = {}
_MEMORIES: dict[str, type[Memory]] = {kind.tier: kind for kind in (Memory, Host, Disk)}


def parse_storage(spec: str | Storage) -> Storage:
    """A Storage from the name of a format, of a memory, or of both: ``"int4+host"``. Parameters follow a name
    as in the spec of a method. Raises SpecError for an unknown name or parameter, and for two formats or two
    memories."""
    if isinstance(spec, Storage):
        return spec
    if not isinstance(spec, str):
        raise SpecError(f"A storage is a string such as 'device'; got {spec!r}.")
    chosen: dict[str, typing.Any] = {}
    for part in spec.split("+"):
        name, rest = split_spec(part)
        find("storage", name, {**_FORMATS, **_MEMORIES})
        role = "memory" if name in _MEMORIES else "format"
        if role in chosen:
            raise SpecError(f"A storage has one format and one memory; leave one part of {spec!r} out.")
        chosen[role] = _memory(name, rest) if role == "memory" else _format(name, rest)
    return Storage(**chosen, spec=spec)


def _memory(name: str, parameters: str) -> Memory:
    kind = _MEMORIES[name]
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    return kind(**parse_parameters(name, parameters, defaults, typing.get_type_hints(kind)))


def _format(name: str, parameters: str) -> type[KV]:
    parse_parameters(name, parameters, {}, {})
    return _FORMATS[name]


def storages(given: str | Storage | Mapping[int, str | Storage] | None, count: int) -> dict[int, Storage]:
    """The storages by layer, of the ``count`` layers of a model, of which a mapping names some. Layers that
    are not in the result keep plain numbers on the device."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {i: parse_storage(spec) for i, (_, spec) in by_layer("storage", given, count).items()}
    return dict.fromkeys(range(count), parse_storage(given))
