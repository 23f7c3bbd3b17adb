"""How users name mixers: ``"gated_linear:window=64"``."""

from __future__ import annotations

import inspect
import typing

from ..errors import SpecError
from ..spec import find, parse_parameters, split_spec
from .geometry import Geometry
from .mixer import Mixer, registered

_MOST = 1 << 40  # bytes of a state, which no machine's memory holds for a layer


def mixers() -> dict[str, type[Mixer]]:
    """Every mixer that a geometry makes, by name; mixers defined outside farspan are among them."""
    return {name: cls for name, cls in registered().items() if cls.from_geometry}


def parse_mixer(spec: str, geometry: Geometry) -> Mixer:
    """A mixer with fresh weights from ``"name"`` or ``"name:par=value,par=value"``.

    Raises SpecError, naming the nearest known name, for an unknown mixer or parameter, for a value it cannot
    take, for sizes that no memory holds, and for a geometry that it does not fit.
    """
    if not isinstance(spec, str):
        raise SpecError(f"A mixer is a string such as 'gated_linear:window=64'; got {spec!r}.")
    name, text = split_spec(spec)
    cls = find("mixer", name, mixers())
    takes = {
        key: parameter.default
        for key, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    values = parse_parameters(name, text, takes, typing.get_type_hints(cls.__init__))
    try:
        mixer = cls(geometry, **values)
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # torch's, for too large sizes
        reason = str(error).partition("\n")[0]
        raise SpecError(f"{spec!r} cannot be made: {reason}. Give smaller sizes.") from error
    if mixer.state_bytes > _MOST:
        raise SpecError(
            f"{spec!r} keeps {mixer.state_bytes:,} bytes of each sequence, more than the {_MOST:,} that "
            "are possible: give smaller sizes."
        )
    return mixer
