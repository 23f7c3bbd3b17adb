"""How a layer's cache keeps keys and values: in which format, and in which memory."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...attention.errors import SpecError
from ...attention.kv import KV
from ...attention.packing import Int4, Int8, Packing
from ...attention.spec import find, parse_parameters, split_spec
from ..layer_numbers import by_layer
from .disk import Disk
from .host import Host
from .memory import Memory


@dataclass(frozen=True, kw_only=True)
class Storage:
    """The format and the memory of a store. The default is plain numbers on the device.

    format: that of positions as they are appended. packing: how older positions are rounded in groups; None:
    not at all.
    """

    format: type[KV] = KV
    packing: Packing | None = None
    memory: Memory = field(default_factory=Memory)
    spec: str = field(default="device", compare=False)  # as users write it

    def __str__(self) -> str:
        return self.spec

    @property
    def numbers(self) -> str:
        """The format alone, on which the contents of a store depend."""
        return self.format.format if self.packing is None else str(self.packing)


DEVICE = Storage()
_PACKINGS: dict[str, type[Packing]] = {"int8": Int8, "int4": Int4}
_MEMORIES: dict[str, type[Memory]] = {kind.tier: kind for kind in (Memory, Host, Disk)}
# A plus sign that no name follows belongs to the name of a folder.
_PARTS = re.compile(rf"\+(?=(?:{'|'.join((*_MEMORIES, *_PACKINGS))})\b)")


def parse_storage(spec: str | Storage) -> Storage:
    """A Storage from the name of a format, of a memory, or of both: ``"int4+host"``. Parameters follow a name
    as in the spec of a method. Raises SpecError for an unknown name or parameter, and for two formats or two
    memories."""
    if isinstance(spec, Storage):
        return spec
    if not isinstance(spec, str):
        raise SpecError(f"A storage is a string such as 'device'; got {spec!r}.")
    chosen: dict[str, typing.Any] = {}
    for part in _PARTS.split(spec):
        name, rest = split_spec(part)
        kinds: dict[str, type[Memory] | type[Packing]] = {**_MEMORIES, **_PACKINGS}
        kind = find("storage", name, kinds)
        role = "memory" if name in _MEMORIES else "packing"
        if role in chosen:
            raise SpecError(f"A storage has one format and one memory; leave one part of {spec!r} out.")
        defaults = {f.name: f.default for f in dataclasses.fields(kind)}
        chosen[role] = kind(**parse_parameters(name, rest, defaults, typing.get_type_hints(kind)))
    return Storage(**chosen, spec=spec)


def storages(given: str | Storage | Mapping[int, str | Storage] | None, count: int) -> dict[int, Storage]:
    """The storages by layer, of the ``count`` layers of a model, of which a mapping names some. Layers that
    are not in the result keep plain numbers on the device."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {i: parse_storage(spec) for i, (_, spec) in by_layer("storage", given, count).items()}
    return dict.fromkeys(range(count), parse_storage(given))
