"""How users name mixers: ``"gated_linear:window=64"``."""

from __future__ import annotations

import inspect
import typing

from ..errors import SpecError
from ..spec import nearest, parse_parameters, split_spec
from .geometry import Geometry
from .mixer import Mixer, registered


def mixers() -> dict[str, type[Mixer]]:
    """Every mixer that a geometry makes, by name; mixers defined outside farspan are among them."""
    return {name: cls for name, cls in registered().items() if cls.from_geometry}


def parse_mixer(spec: str, geometry: Geometry) -> Mixer:
    """A mixer with fresh weights from ``"name"`` or ``"name:par=value,par=value"``.

    Raises SpecError, naming the nearest known name, for an unknown mixer or parameter, for a value it cannot
    take, and for a geometry that it does not fit.
    """
    name, text = split_spec(spec)
    known = mixers()
    if name not in known:
        raise SpecError(
            f"There is no mixer {name!r}{nearest(name, known)}; the mixers are {', '.join(known)}."
        )
    cls = known[name]
    takes = {
        key: parameter.default
        for key, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return cls(geometry, **parse_parameters(name, text, takes, typing.get_type_hints(cls.__init__)))
